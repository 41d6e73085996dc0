#!/bin/sh
# CIFAR-10 with the paper's U-Net (35.7 M parameters): FedAvg against FedPhD and FedPhD-OS at the
# paper's local work: 20 clients of two classes, 40% of them per round, 2 edges; 200 cloud rounds are
# our choice, since the authors' scripts differ. Nothing is tuned: all have the scripts' learning rate.
#
#   docs/results/cifar10.sh OUT [flags of `fedphd compare`]
#   docs/results/cifar10.sh runs/cifar10 --seeds 0 --gpus 0.25
#   docs/results/cifar10.sh runs/cifar10 --data train.parquet --set evaluation.reference.source=train.parquet
#
# Stopped, the same command goes on with the runs that are missing. Images come from the Hugging
# Face hub unless --data and evaluation.reference.source name a copy (columns image and label).
# Distances are in a small classifier's features unless evaluation.inception_weights names
# torch-fidelity's file of weights: only with those are they FID.
set -eu

if [ $# -lt 1 ]; then
    echo "usage: $0 OUT [flags of fedphd compare]" >&2
    exit 2
fi
out=$1
shift

hub="--set evaluation.reference.source=uoft-cs/cifar10 --set evaluation.reference.image_column=img"
case " $* " in
*evaluation.reference.source=*) hub="" ;;
esac

# shellcheck disable=SC2086 # the flags are words
exec fedphd compare --preset cifar10 --methods fedavg,fedphd,fedphd_os --out "$out" \
    --set evaluation.raw_too=true $hub "$@"
