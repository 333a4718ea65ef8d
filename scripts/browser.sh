#!/bin/sh
# Install Chromium from Debian's packages if there is none and apt may be used. Never fails: tests that want it are skipped.
for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do
  if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
say() { echo "browser: $1; the tests of the report's page will be skipped" >&2; exit 0; }
command -v apt-get >/dev/null 2>&1 || say "no Chromium and no apt-get"
[ "$(id -u)" = 0 ] || say "no Chromium, and apt-get needs root"
echo "browser: installing Chromium for the tests of the report's page" >&2
export DEBIAN_FRONTEND=noninteractive
{ timeout 120 apt-get update -qq && timeout 420 apt-get install -y -qq --no-install-recommends chromium; } \
  </dev/null >/dev/null 2>&1 || say "Chromium could not be installed"
