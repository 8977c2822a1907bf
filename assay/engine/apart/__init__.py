"""Engines in processes of their own: replicas, or one that reads prompts and one that goes on with the replies.

config -> router (who gets a request) -> wire (messages and states between processes) -> worker (an engine's process) ->
cluster (the front, with an engine's surface). Zhong et al. 2024 (DistServe, arXiv 2401.09670), Patel et al. 2024
(Splitwise, arXiv 2311.18677), Qin et al. 2025 (Mooncake, arXiv 2407.00079).
"""
