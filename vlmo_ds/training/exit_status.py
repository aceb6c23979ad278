"""Exit statuses of train_ds.py; docs/resuming.md tells users of them."""

DONE = 0
UNUSABLE = 2  # a setting or file that cannot be used
DIVERGED = 3  # training has failed for good
MISCOMPUTED = 4  # a machine computes wrongly
LOST_A_RANK = 69  # another rank died, hangs or has failed (EX_UNAVAILABLE of sysexits.h)
ASKED_TO_STOP = 75  # a checkpoint is written, the same command goes on (EX_TEMPFAIL of sysexits.h)
