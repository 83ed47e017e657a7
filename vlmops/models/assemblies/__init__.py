"""The four types of architecture: how images come into the language model.

| type | file | who |
|---|---|---|
| A, B: image tokens among the text's; the tower frozen (A) or trained (B) | ``projected.py`` | LLaVA, Qwen2-VL, PaliGemma |
"""
