#!/bin/sh
# The comparisons of docs/results/PROTOCOL.md on the digits; two CPU cores need hours for each.
#
#   docs/results/digits.sh NAME OUT [flags of `fedphd compare`]
#   docs/results/digits.sh headline runs/headline
#   docs/results/digits.sh sources runs/sources --tuning-from runs/headline
#
# NAME is headline, sources (where the gain comes from), ratios (quality against pruning ratio), or
# local-work (10 local epochs against 5 x 2), or codecs (bytes a value; with the preset's own values).
# The others take what the headline has tuned: --tuning-from docs/results/headline, or your own.
#
# Stopped, the same command goes on with the runs that are missing. A copy of docs/results/NAME as
# OUT goes on where that comparison ended. What has been tuned in a copy of the headline since is
# taken over with --tuning-from COPY.
set -eu

if [ $# -lt 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1
out=$2
shift 2
here=$(dirname "$0")
rounds=80
amount=1
seeds=0,1,2
# The protocol is older than the defaults of [wire]; codecs.toml has its own.
exact="--set wire.cloud_down=fp32 --set wire.cloud_up=fp32 --set wire.client_down=fp32
    --set wire.client_up=fp32"
tuning="--tuning-from $here/headline"

case $name in
headline)
    methods=fedavg,fedprox,moon,scaffold,feddiffuse,fedphd,fedphd_os,hierarchical_fedavg,centralised
    methods=$methods,fedavg_slower
    rounds=160
    seeds=0,1,2,3,4
    tuning="--methods-file $here/rates.toml --tuning-seeds 100,101 --tuning-intervals 80
        --tune training.learning_rate=0.002,0.001,0.0005
        --tune objective.proximal_mu=0.01,0.001,0.1 --tune objective.moon_mu=1,0.1,5
        --tune aggregation.step_size=1,0.5,1.5
        --tune selection.policy=balanced,homogeneity,best_homogeneity
        --tune aggregation.factor=2,0,20"
    ;;
sources)
    methods=fedavg,fedphd,fedphd_dense,fedphd_random,fedphd_published,fedphd_dense_random
    methods=$methods,hierarchical_fedavg,fedavg_often,centralised
    tuning="$tuning --methods-file $here/sources.toml"
    ;;
ratios)
    methods=fedavg,fedphd,fedphd_os,fedphd_dense,fedphd_15,fedphd_os_15,fedphd_40,fedphd_os_40
    tuning="$tuning --methods-file $here/ratios.toml"
    ;;
local-work)
    methods=fedavg,fedprox,moon,scaffold,feddiffuse,fedphd,fedphd_os
    rounds=20
    amount=2
    ;;
codecs)
    methods=fedavg,fedphd,fedphd_bf16,fedphd_int8,fedphd_int4,fedphd_int4_cloud
    rounds=12
    amount=2
    tuning="--methods-file $here/codecs.toml"
    ;;
*)
    echo "$0: $name: there is no such comparison" >&2
    exit 2
    ;;
esac

# Each kind of processor would train a slightly different one, in which distances are others.
mkdir -p "$out/.cache"
for file in "$here"/classifiers/*.safetensors; do
    [ -e "$out/.cache/${file##*/}" ] || cp "$file" "$out/.cache/"
done

# shellcheck disable=SC2086 # the flags are words
exec fedphd compare --out "$out" --preset digits --methods $methods --seeds $seeds $tuning \
    --clients 20 --jobs 2 --set schedule.participation=0.4 --set training.local_amount=$amount \
    --set schedule.intervals=$rounds --set evaluation.every_intervals=$((rounds / 4)) \
    --set evaluation.raw_too=true --set reproducible=true $exact "$@"
