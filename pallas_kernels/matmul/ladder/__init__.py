"""Matrix multiplication on Hopper, one technique a step, each interpreted on a laptop as well.

    naive             a tile a block, every copy waited for
    tiled             larger tiles: fewer bytes
    pipelined         copies ahead of products
    warp_specialised  one warpgroup copies, two multiply
    tiled_epilogue    sums leave in pieces while the next is made
    persistent        blocks that stay, tiles in an order that the L2 cache likes
    multicast         two blocks share what both need
    ping_pong         two warpgroups take turns at the tensor cores

`broken` is a ring with mistakes planted in it, for the race detector to find.
"""

STEPS = (
    "naive",
    "tiled",
    "pipelined",
    "warp_specialised",
    "tiled_epilogue",
    "persistent",
    "multicast",
    "ping_pong",
)
