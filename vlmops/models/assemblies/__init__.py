"""The four types of architecture: how images come into the language model.

| type | file | who |
|---|---|---|
| A, B: image tokens among the text; tower frozen (A) or trained (B) | ``projected.py`` | LLaVA, Qwen2-VL, PaliGemma, BLIP-2 |
| C: cross-attention: between the decoder's blocks | ``crossed.py`` | Flamingo, Idefics |
| C: weights of their own for image tokens | ``expert.py`` | CogVLM2 |
| C: cross-attention in the connector | ``qwen_vl.py`` | Qwen-VL |
| D: no tower; patches or codes of images among the text, one model | ``native.py`` | Fuyu, Chameleon |
"""
