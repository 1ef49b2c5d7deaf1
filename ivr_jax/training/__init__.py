"""The three stages (`image_tokenizer.py`, `sft.py`, `grpo.py`) and what they share."""
