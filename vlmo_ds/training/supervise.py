"""The command `python -m vlmo_ds.training.supervise`, which lives in vlmo_ds.planning.supervise now."""

import runpy

if __name__ == "__main__":
    runpy.run_module("vlmo_ds.planning.supervise", run_name="__main__", alter_sys=True)
