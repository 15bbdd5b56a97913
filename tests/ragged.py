"""lax.ragged_all_to_all on CPU devices, where XLA has no such operation. Importing this makes moe.py use it.

R rows of a device's buffer  D hidden  P devices  C = P*e chunks that come to one device"""
import jax.numpy as jnp
from jax import lax

import kernels


def emulated_ragged_all_to_all(x_RD, out_RD, input_offsets, send_sizes, output_offsets, recv_sizes,
                               axis_name):
    """lax.ragged_all_to_all as its documentation defines it, by gathering everything: XLA's CPU
    backend lacks it. It reads the senders' view and never recv_sizes, which a test compares."""
    me, P = lax.axis_index(axis_name), lax.axis_size(axis_name)
    x_PRD = lax.all_gather(x_RD, axis_name)

    def to_me(a):               # of all senders, the chunks that come here
        a_PPe = lax.all_gather(a, axis_name).reshape(P, P, -1)
        return lax.dynamic_slice_in_dim(a_PPe, me, 1, axis=1).reshape(-1)
    start_C, size_C, goal_C = to_me(input_offsets), to_me(send_sizes), to_me(output_offsets)
    row_R1 = jnp.arange(out_RD.shape[0])[:, None]
    hit_RC = (row_R1 >= goal_C) & (row_R1 < goal_C + size_C)    # at most one chunk covers a row
    sender_C = jnp.arange(len(goal_C)) // (len(goal_C) // P)
    source_RC = sender_C * x_RD.shape[0] + start_C + row_R1 - goal_C
    source_R = jnp.sum(jnp.where(hit_RC, source_RC, 0), axis=1)
    rows_RD = x_PRD.reshape(-1, x_RD.shape[1])[source_R]
    return jnp.where(jnp.any(hit_RC, axis=1)[:, None], rows_RD, out_RD)


kernels.RAGGED_ALL_TO_ALL["cpu"] = emulated_ragged_all_to_all
