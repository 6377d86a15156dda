# Shortcuts. Each prints the plain command it runs; none is needed to work here.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: help setup demo test test-slow smoke bench gpu-check lint format rally ball captions vessels

help:
	@echo "make demo       set up .venv, train on rendered rallies, find the contacts in an unseen video (about 8 minutes)"
	@echo "make rally      the real-video job: train on the labelled tennis rally under LAB_SHARED, predict, evaluate"
	@echo "make ball       the ball of a real rally under LAB_SHARED by its motion: track, scores, hits (2 minutes)"
	@echo "make captions   train a captioner on rendered shapes: cross-entropy, CIDEr reward, captions, scores (5 minutes)"
	@echo "make vessels    the vessel job: train the U-Net on CHASE_DB1 under LAB_SHARED, predict, evaluate (8 minutes)"
	@echo "make test       set up .venv, lint, all quick tests"
	@echo "make test-slow  the trainings marked slow as well"
	@echo "make smoke      does every system run here?"
	@echo "make bench      timing tables"
	@echo "make gpu-check  everything that needs a GPU, one table for LOG.md"
	@echo "make lint       ruff check and format check;   make format  applies them"

# .venv is made once and again only when requirements.txt changes
setup: .venv/installed
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch .venv/installed

# preset of the demo: the small encoder, 64 px, so that two CPU cores need a few minutes
DEMO := --encoder tiny --input graydiff --size 64x64 --no-peak --lr 2e-3 --steps 800 --val-every 800 --save-every 800 \
  --val-clips 320 --print-every 50

demo: setup
	rm -rf runs/demo
	$(PY) train/train.py --head bimamba2 $(DEMO) --out runs/demo/bimamba2 --log "make demo: unseen clips, BiMamba2"
	$(PY) train/train.py --head identity $(DEMO) --out runs/demo/identity --log "make demo: unseen clips, Identity"
	$(PY) data/prepare_rally.py runs/demo/unseen_rally.mp4 --seed 777 --seconds 30
	$(PY) eval/infer_peaks.py runs/demo/unseen_rally.mp4 --ckpt runs/demo/bimamba2/last --out runs/demo/peaks
	$(PY) eval/eval_peaks.py --pred runs/demo/peaks/peaks.json --labels runs/demo/unseen_rally.json \
	  --classes near_court_swing --json runs/demo/eval.json --log "make demo: an unseen rendered rally"

# the real-video job of README: needs the labelled rally under LAB_SHARED
LAB_SHARED ?= ../shared
R := $(LAB_SHARED)/data/tempopeak
RALLY_LABELS := $(R)/annotations/tennis_rally_first_1500.json $(R)/annotations/tennis_no_event_tail.json
RALLY := --crop 90,150,470,170 --size 112x40 --input graydiff --encoder tiny --shift tsm --head bimamba2 \
  --dropout 0.3 --lr 2e-3 --splice 0.4 --steps 1000

rally: setup
	rm -rf runs/rally
	$(PY) train/train.py --data $(RALLY_LABELS) --videos $(R)/videos --task spot --classes near_court_swing $(RALLY) --out runs/rally
	$(PY) eval/infer_peaks.py $(R)/videos/tennis_rally_first_1500.mp4 $(R)/videos/tennis_no_event_tail.mp4 --ckpt runs/rally/last --out runs/rally/pred
	$(PY) eval/eval_peaks.py --pred runs/rally/pred/peaks.json --labels $(RALLY_LABELS) --classes near_court_swing --json runs/rally/eval.json

# a real rally whose ball is labelled, seen by a fixed camera: needs no weights
BALL := $(R)/videos/artlabss_video_input6

ball: setup
	rm -rf runs/ball
	$(PY) eval/infer_ball.py $(BALL).mp4 --detector motion --out runs/ball/track
	$(PY) eval/eval_ball.py --pred runs/ball/track/tracks.json --labels $(LAB_SHARED)/data/sam3/tennis_clips/video_input6_ball.csv
	$(PY) eval/infer_hits.py runs/ball/track/tracks.json --video $(BALL).mp4 --out runs/ball/hits

# preset of the caption job: a tower of two layers trained from nothing on pictures of 64 px
SHAPES := --data runs/captions/shapes --cache-gb 1 --batch-size 16 --train-backbone --backbone-lr 1 --print-every 50

captions: setup
	rm -rf runs/captions
	$(PY) data/prepare_shape_captions.py runs/captions/shapes
	$(PY) train/train_fsgr.py $(SHAPES) --preset tiny --image-size 64 --min-freq 1 --captions-per-image 5 --epochs 30 --val-epochs 10 --lr 2e-3 --out runs/captions/xe
	$(PY) train/train_fsgr.py $(SHAPES) --stage rl --init runs/captions/xe/best --epochs 6 --val-epochs 2 --lr 1e-4 --out runs/captions/rl
	$(PY) eval/infer_captions.py runs/captions/shapes/val2017 --ckpt runs/captions/rl/best --out runs/captions/pred --semantic-map
	$(PY) eval/eval_captions.py --pred runs/captions/pred/captions.json --labels runs/captions/shapes/annotations/captions_val2017.json

# the vessel job of README: needs CHASE_DB1 under LAB_SHARED
CHASE := $(LAB_SHARED)/data/sa2va/chase_db1

vessels: setup
	rm -rf runs/unet
	$(PY) train/train_vessel_unet.py --data $(CHASE) --out runs/unet
	$(PY) eval/infer_vessels.py $(CHASE)/images/Image_1[1-4]*.jpg --ckpt runs/unet/best --tta --out runs/unet/test
	$(PY) eval/eval_vessels.py --pred runs/unet/test --labels $(CHASE) --json runs/unet/test.json

test: setup lint
	$(PY) -m pytest -q -m "not slow"

test-slow: setup
	$(PY) -m pytest -q -m slow

smoke: setup
	$(PY) smoke/smoke_mamba.py
	$(PY) smoke/smoke_tempopeak.py
	$(PY) smoke/smoke_fsgr.py
	$(PY) smoke/smoke_fastsam2.py
	$(PY) smoke/smoke_sa2va.py
	$(PY) smoke/smoke_sam3.py
	$(PY) smoke/smoke_esam.py

bench: setup
	$(PY) smoke/bench_mamba.py
	$(PY) smoke/bench_mamba.py --memory
	$(PY) smoke/bench_caption_reward.py
	$(PY) smoke/bench_fsgr.py
	$(PY) smoke/bench_fastsam2.py
	$(PY) smoke/bench_streams.py
	$(PY) smoke/bench_sa2va.py
	$(PY) smoke/bench_sam3.py
	$(PY) smoke/bench_sparse.py
	$(PY) smoke/bench_scene_stream.py

gpu-check: setup
	$(PY) -m pytest -q -m gpu
	$(PY) smoke/smoke_gpu.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
