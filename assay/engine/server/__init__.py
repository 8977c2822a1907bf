"""An OpenAI-compatible HTTP server around the engine, and its chat page (extra `serve`).

config -> worker (the one thread that owns the engine) -> schema, prompts, replies (bodies in, bodies out) -> service
(the routes) -> guard (hosts, keys, sizes) -> app -> run (sockets and signals).
"""
