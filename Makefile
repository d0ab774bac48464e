# What one does with this repository. `make` alone lists it. GNU make 3.81+ and a POSIX shell.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/mura-course-installed
# Empty (`make test CONSTRAINTS=`) installs the newest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# smoke (seconds a chapter), demo (a 2-core laptop) or full (MURA on a GPU).
MURA_PROFILE ?= demo
export MURA_PROFILE
PORT ?= 8000
# What prints the book as a PDF: Chromium, Chrome or Edge.
BROWSER_COMMAND ?= chromium
# Cell ids stay (Jupyter keeps them, so diffs are small); the author's own Python version goes.
STRIP := --keep-id --extra-keys metadata.language_info.version
HTML = _build/$(MURA_PROFILE)/_build/html
ONE_PAGE = _build/$(MURA_PROFILE)/_build/singlehtml/index.html
COVERAGE := --cov --cov-report= --cov-fail-under=0
STARTED := $(shell date +%s)

.PHONY: help install book runs pdf test test-gpu lint bench serve clean
.DEFAULT_GOAL := help

help:
	@echo "make book    make .venv, install, execute the chapters and render them (MURA_PROFILE=$(MURA_PROFILE))"
	@echo "make install make .venv and install into it, and nothing else"
	@echo "make runs    make the recorded runs in book/_runs that are missing (hours; ONLY=name,name for some)"
	@echo "make pdf     the book as one page, printed to a PDF by $(BROWSER_COMMAND) (BROWSER_COMMAND=google-chrome)"
	@echo "make test    unit and slow tests with their coverage, then every chapter in profile smoke"
	@echo "make test-gpu every chapter on demo data; fails where TensorFlow or PyTorch sees no GPU"
	@echo "make lint    ruff, types, which room imports which; chapters must be stripped of outputs"
	@echo "make bench   every benchmark in benchmarks/"
	@echo "make serve   show the built book at http://127.0.0.1:$(PORT)  (PORT=...)"
	@echo "make clean   remove built books and tool caches (keeps .venv, the demo data and finished runs)"
	@echo "Another Python than $(PYTHON): make book PYTHON=/path/to/python3.12"

install: $(INSTALLED)

# The stamp is written last and holds the seconds that installing took: an interrupted install is not
# taken for done, and a changed pyproject.toml or constraints.txt installs again. opencv-python needs a window
# system's libraries; where they are missing, its headless build is put over it, and pip says so.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  echo "The book needs Python 3.11, 3.12 or 3.13 (TensorFlow's builds end there)," >&2; \
	  echo "and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Install one of them and name it: make book PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): up to 9 GB (Linux, with CUDA; README.md says how to leave CUDA out)" \
	  "and some minutes the first time;" \
	  "$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }') GB are free here."
	@start=$$(date +%s) && \
	  $(PY) -m pip install -e ".[all]" $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) && \
	  { $(PY) -c "import cv2" 2>/dev/null || $(PY) -m pip install --force-reinstall --no-deps \
	    $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) opencv-python-headless; } && \
	  echo $$(( $$(date +%s) - start )) > $@.part && mv $@.part $@

book: $(INSTALLED)
	@$(PY) scripts/build_book.py --started $(STARTED) --install-stamp $(INSTALLED)

# Finds those that exist and goes on after an interruption. To make one anew, delete its folder first.
runs: $(INSTALLED)
	$(PY) scripts/make_runs.py $(if $(ONLY),--only '$(ONLY)') $(CHAPTERS)

# Executions are shared with `make book`; nothing is run twice.
pdf: $(INSTALLED)
	JUPYTER_PREFER_ENV_PATH=1 $(VENV)/bin/jupyter-book build . --path-output _build/$(MURA_PROFILE) --builder singlehtml
	$(BROWSER_COMMAND) --headless --no-pdf-header-footer --virtual-time-budget=60000 --timeout=600000 \
	  --print-to-pdf=_build/$(MURA_PROFILE)/book.pdf "file://$(CURDIR)/$(ONE_PAGE)"
	@test -s _build/$(MURA_PROFILE)/book.pdf && echo "The PDF is _build/$(MURA_PROFILE)/book.pdf"

# Of the lines of both packages, unit and slow tests together must run what pyproject.toml says. The data are
# prepared once, before two notebooks at a time ask for them. The limit per cell is for a cell that hangs: in
# profile smoke a cell takes seconds.
test: export MURA_PROFILE = smoke
# Two processes on two cores: with threads of their own, torch's would wait for one another.
test: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=10 $(COVERAGE)
	$(PY) -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder --durations=5 $(COVERAGE) --cov-append
	$(PY) -m coverage report
	$(PY) -c "from mura_course import chapter; chapter.start()"
	$(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 \
	  -n 2 --dist loadscope --durations=10 --durations-min=5 book/*.ipynb

# One notebook after the other: a framework takes all the memory of a GPU.
test-gpu: $(INSTALLED)
	$(PY) scripts/require_gpu.py
	env -u MURA_DATA $(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=3600 \
	  --durations=10 --durations-min=5 book/*.ipynb

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(VENV)/bin/pyright
	$(VENV)/bin/nbstripout --verify $(STRIP) book/*.ipynb

bench: $(INSTALLED)
	@set -e; for benchmark in benchmarks/[!_]*.py; do \
	  test -f "$$benchmark" || { echo "There is no benchmark in benchmarks/." >&2; exit 1; }; \
	  echo "== $$benchmark"; $(PY) "$$benchmark"; done

serve:
	@test -f $(HTML)/index.html || { \
	  echo "No book in $(HTML): run 'make book MURA_PROFILE=$(MURA_PROFILE)' first, or show another profile's:" >&2; \
	  echo "make serve MURA_PROFILE=smoke" >&2; exit 1; }
	@$(PYTHON) -m http.server --bind 127.0.0.1 --directory $(HTML) $(PORT)

clean:
	rm -rf _build .pytest_cache .ruff_cache .hypothesis .coverage* build dist mura_course.egg-info
	find mura_course mura_demo tests scripts _ext benchmarks book -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	find book -name .ipynb_checkpoints -prune -exec rm -rf {} +
