# `make lift` trains POCO on Lift, `make test` runs the tests. Both create .venv first; nothing is installed outside it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN = .venv/bin/python

.PHONY: lift test demo clean

lift: .venv/ready
	$(RUN) train_online.py --task lift --preset cpu

test: .venv/ready
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not realtime"
	$(RUN) -m pytest -m realtime                        # they wait for the clock: nothing beside them

demo: .venv/ready
	$(RUN) poco.py

.venv/ready: requirements.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "Python 3.11 is needed, found: $(PYTHON). Name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps robosuite==1.5.2 robomimic==0.3.0
	-$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
		lerobot==0.6.1 diffusers==0.42.1        # optional: the adapters' tests; without it they are skipped, aloud
	@touch $@

clean:
	rm -rf .venv
