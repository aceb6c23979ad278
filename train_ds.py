"""The entry point: deepspeed train_ds.py --deepspeed_config ds_configs/zero2.json [--recipe FILE] [key=value ...]"""

import sys

from vlmo_ds.training.command import main

if __name__ == "__main__":
    sys.exit(main())
