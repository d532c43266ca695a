# Two commands on a fresh machine: `make demo` and `make test`. Needs git, make and Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
AOT_VENV ?= .venv-aot
RUN := $(VENV)/bin/python
WORKDIR := runs/unet

# Large pages for large arrays: without them a step on a CPU spends a tenth of its time on page faults. glibc reads this.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo docs docs-site notebook test check bench bench-fit bench-quality bench-packages aot-packages browser-packages watch-packages clean

demo: $(VENV)/.demo
	$(RUN) -m mrjax.main --config=configs/unet.py --workdir=$(WORKDIR)
	@unseen=$$(ls data/demo/test/*_T201.t5 | head -n 1) && \
	  $(RUN) -m mrjax.reconstruct --workdir=$(WORKDIR) --input=$$unseen --output=$(WORKDIR)/reconstructed
	$(RUN) -m mrjax.evaluate --workdir=$(WORKDIR) --split=test
	$(RUN) -m mrjax.evaluate --workdir=$(WORKDIR) --split=test --method=cs
	@ls -d $(WORKDIR)/checkpoints/* $(WORKDIR)/metrics.* $(WORKDIR)/report*.html $(WORKDIR)/curves.png $(WORKDIR)/tensorboard $(WORKDIR)/reconstructed/*

# The README's picture and table, from the demo's own output.
docs: demo
	mkdir -p docs
	cp $(WORKDIR)/reconstructed/*.png docs/demo.png
	$(RUN) -m mrjax.evaluate --workdir=$(WORKDIR) --split=test > docs/demo.txt
	$(RUN) -m mrjax.evaluate --workdir=$(WORKDIR) --split=test --method=cs >> docs/demo.txt

# The site, in build/site: warnings are errors, and a link that leads nowhere is a warning.
docs-site: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Run the tutorial and write its results into it: one to three minutes on 2 cores.
notebook: $(VENV)/.notebook
	$(VENV)/bin/jupyter execute --inplace docs/tutorial.ipynb

test: $(VENV)/.test
	$(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

check: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/hadolint --ignore DL3008 --ignore DL3013 Dockerfile  # versions are pyproject.toml's
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# Measure and rewrite benchmarks/README.md: about 20 minutes on 2 cores.
bench: bench-packages
	$(RUN) -m benchmarks.tables --aot_python=$(AOT_VENV)/bin/python

# Train every network three times and score it, and three more on real heads: two and a half hours on 2 cores.
bench-quality: bench-packages
	$(RUN) -m benchmarks.quality
	$(RUN) -m benchmarks.denoising
	$(RUN) -m benchmarks.transfer --train=250,250,2400

# `make bench` with training steps compiled ahead of time for GPUs and TPUs that are not here.
bench-fit: aot-packages
	$(MAKE) bench

# The packages we compare with: fastMRI's without its trainer, and a CPU build of PyTorch where one is served.
bench-packages: $(VENV)/.bench

$(VENV)/.bench: $(VENV)/.test
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet -e '.[bench]'
	$(RUN) -m pip install --quiet --no-deps fastmri==0.3.0
	@touch $@

# A browser that looks at reports in the tests: the system's Chromium, installed if it is not there (as root on Debian).
browser-packages: $(VENV)/.browser

$(VENV)/.browser: $(VENV)/.test
	command -v chromium > /dev/null || apt-get install --yes --quiet chromium > /dev/null
	$(RUN) -m pip install --quiet -e '.[browser]'
	@touch $@

# Weights & Biases, MLflow and Optuna, which the tests use without a network.
watch-packages: $(VENV)/.watch

$(VENV)/.watch: $(VENV)/.test
	$(RUN) -m pip install --quiet -e '.[watch]'
	@touch $@

# The ahead-of-time compilers have an environment of their own: their plugins warn of missing drivers at every import.
aot-packages: $(AOT_VENV)/.aot

$(AOT_VENV)/.aot: pyproject.toml
	$(PYTHON) -m venv $(AOT_VENV)
	$(AOT_VENV)/bin/python -m pip install --quiet -e '.[aot]'
	@touch $@

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "mrjax needs Python 3.11 or newer, found $$($(PYTHON) --version); try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.demo $(VENV)/.docs $(VENV)/.notebook $(VENV)/.test: $(VENV)/.%: $(VENV)/.venv pyproject.toml
	@echo "installing mrjax[$*] into $(VENV): a few minutes the first time"
	$(RUN) -m pip install --quiet -e '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) $(AOT_VENV) $(WORKDIR) data/demo build
