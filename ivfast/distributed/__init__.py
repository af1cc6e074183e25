"""The pairwise ops over the samples of every rank of a `torch.distributed` group.

Each rank passes its rows and calls with the rest of the group; counts of rows may differ, a rank may have none. The
samples are those of all ranks in their order: what one process computes on the concatenation. `group` None is the
default group.

**What a loss means.** Every rank goes backward from a loss of its own. A rank's rows get the gradient of the *sum* of
all ranks' losses, as if one process had added them. DistributedDataParallel divides by the number of ranks: training
lowers the *mean* of the ranks' losses. So a global scalar, which every rank returns, counts once, and so does the mean
of a rank's own rows where counts are equal. Without DDP, divide by the number of ranks. Backward exchanges too: every
rank must call it, and in the same order.

**exchange**: "gather" takes all rows to every rank, where the op of one process runs on them: the same bits as there,
O(n d) memory, and each rank does the work of all. "ring" passes blocks from rank to rank, while the block before is
worked on: O(n_rank d) memory, a rank does its share, by streamed PyTorch; gradients pass around a second time, or
for MMD in the same pass. "auto" gathers up to 16384 rows in all.

**even**: that all ranks hold equally many rows need not be asked. Otherwise each call exchanges counts, which waits for
the device, and raises on all ranks where one does not fit.
"""

from .divergences import as_distance, fld, mmd, multi_js_loss
from .exchange import Rows, gather_rows, rows_of
from .stein import median_bandwidth, svgd_bridge, svgd_direction

__all__ = [
    "Rows",
    "as_distance",
    "fld",
    "gather_rows",
    "median_bandwidth",
    "mmd",
    "multi_js_loss",
    "rows_of",
    "svgd_bridge",
    "svgd_direction",
]
