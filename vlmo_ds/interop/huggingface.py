"""The families as Hugging Face models: importing this module makes them known to the Auto classes.

    import vlmo_ds.interop.huggingface
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)

FOLDER is what `python -m vlmo_ds.interop.export` writes. Neither DeepSpeed nor a process group is needed. Each family's own
classes are in its folder (vlmo_ds/families/<name>/huggingface.py), and can be imported from here as well.
"""

from __future__ import annotations

from vlmo_ds.families import FAMILIES

for family in FAMILIES.values():
    module = family.huggingface()
    globals().update({name: value for name, value in vars(module).items() if not name.startswith("_")})
