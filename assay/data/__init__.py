"""Corpora, tokenizers, token shards and packed batches; `tasks/` holds synthetic diagnostics, one file each.

The path of a text: `open_corpus` -> `build_tokenizer` -> `encode_documents` (a memory-mapped shard) -> `Loader` or
`windows` (batches on one flat axis). `open_dataset` walks it whole. Only `loader` imports torch.
"""
