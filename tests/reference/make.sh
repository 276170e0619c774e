#!/usr/bin/env bash
# Makes every file under tests/fixtures anew, about three minutes. `git diff --stat tests/fixtures` must show nothing.
#   tests/reference/make.sh          all
#   tests/reference/make.sh tiny     without the default model
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$here/setup.sh" | tail -n 1)
export PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1

"$python" "$here/tiny_models.py"
"$python" "$here/tiny_adapters.py"
"$python" "$here/tiny_training.py"
if [ "${1:-all}" != tiny ]; then
  "$python" "$here/smollm2.py"
fi
find "$here/../fixtures" -type f -exec chmod 644 {} +
