#!/bin/sh
# Photographs on two CPU cores: CIFAR-10 at 16x16, as docs/results/PROTOCOL.md says; five to seven hours.
#
#   docs/results/cifar10-16.sh OUT [FILE.parquet] [flags of `fedphd compare`]
#   docs/results/cifar10-16.sh runs/cifar10-16 cifar10/train.parquet
#
# Images come from the Hugging Face hub unless a copy is named (columns image and label). Stopped,
# the same command goes on with the runs that are missing.
set -eu

if [ $# -lt 1 ]; then
    echo "usage: $0 OUT [FILE.parquet] [flags of fedphd compare]" >&2
    exit 2
fi
out=$1
shift
copy=""
# The protocol is older than the defaults of [wire].
exact="--set wire.cloud_down=fp32 --set wire.cloud_up=fp32 --set wire.client_down=fp32
    --set wire.client_up=fp32"
case ${1:-} in
*.parquet)
    copy="--data $1"
    shift
    ;;
esac

# shellcheck disable=SC2086 # the flags are words
exec fedphd compare --out "$out" --preset cifar10-16 $copy \
    --methods fedavg,scaffold,fedphd,fedphd_os --seeds 0,1,2 --jobs 2 \
    --tune training.learning_rate=0.002,0.001,0.0005 --tuning-seeds 100 --tuning-intervals 20 \
    --set evaluation.raw_too=true --set reproducible=true $exact "$@"
