#!/usr/bin/env bash
# Train UPerNet on a small SP-ViT on scenes of handwritten digits, evaluate the
# saved checkpoint, and draw what it predicts. No download.
# Usage: [WORK_DIR=work_dirs/demo-segmentation] demo_segmentation.sh
set -euo pipefail

if [ "$#" -gt 0 ]; then
    echo "Usage: [WORK_DIR=work_dirs/demo-segmentation] $0" >&2
    exit 2
fi

ROOT=$(dirname "$0")/..
NAME=spvit-mini_upernet_1xb16-700i_digit-scenes-64x96
CONFIG=$ROOT/configs/segmentation/$NAME.py
WORK=${WORK_DIR:-work_dirs/demo-segmentation}

echo "== Train $NAME (a few minutes on two quiet cores)"
python "$ROOT"/tools/train.py "$CONFIG" --work-dir "$WORK"
CHECKPOINT=$(cat "$WORK/last_checkpoint")

echo "== Evaluate $CHECKPOINT on 200 scenes of digits that training never saw"
python "$ROOT"/tools/test.py "$CONFIG" "$CHECKPOINT" --work-dir "$WORK/test" \
    --out "$WORK/metrics.json" --out-item metrics

echo "== Draw images, ground truth and prediction"
python "$ROOT"/tools/visualization/show_segmentation.py "$CONFIG" "$CHECKPOINT" \
    --out "$WORK/scenes.png"

MIOU=$(python -c "import json, sys; print('%.2f' % json.load(open(sys.argv[1]))['mIoU'])" "$WORK/metrics.json")
cat <<END

== Done
   mIoU         $MIOU over 10 digits and background, 200 validation scenes
   checkpoint   $CHECKPOINT
   picture      $WORK/scenes.png
END
