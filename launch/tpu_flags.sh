# shellcheck shell=bash
# Options of the TPU compiler for a run, the ones that `python -m ivr_jax.compile` plans with.  Sourced by the other scripts.
#
#   source launch/tpu_flags.sh; export LIBTPU_INIT_ARGS; LIBTPU_INIT_ARGS="$(libtpu_flags v5p)"
#
# The sparse cores of v5p and v6e move weights and gradients while the matrix units work; v5e and v4 have none for it.
libtpu_flags() {
  local flags="--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 --xla_enable_async_all_gather=true"
  local offload="--xla_tpu_enable_sparse_core_collective_offload"
  case "$1" in
    v5p* | v6e*)
      flags+=" ${offload}_all_gather=true ${offload}_2d_all_gather=true ${offload}_reduce_scatter=true"
      flags+=" ${offload}_all_reduce=true --xla_tpu_use_tc_device_shape_on_sc=true"
      ;;
  esac
  echo "$flags"
}
