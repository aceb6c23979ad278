"""The command `python -m vlmo_ds.training.plan`, which lives in vlmo_ds.planning.plan now."""

import runpy

if __name__ == "__main__":
    runpy.run_module("vlmo_ds.planning.plan", run_name="__main__", alter_sys=True)
