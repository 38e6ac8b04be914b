#!/usr/bin/env bash
# Runs Stryker.NET over folders of the engine, in a copy, and prints what survived: file, line, what stood there, what stood there instead.
#
#   tests/mutations/stryker.sh [FOLDER ...]     default: Scheduling Weights Requests Formats
#
# The tests on the simulated device are left out: they take two thirds of the suite's time and run the same engine once more.
# The update transaction of the server is not among the folders: its tests run a server process, which Stryker cannot switch mutants in.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
export DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_NOLOGO=1
[ $# -gt 0 ] || set -- Scheduling Weights Requests Formats

work=$(mktemp -d "${TMPDIR:-/tmp}/rollout-stryker.XXXXXX")
trap 'rm -rf "$work"' EXIT
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -c --ignore-failed-read 2> /dev/null) | tar -x -C "$work"
dotnet tool install dotnet-stryker --version 5.1.0 --tool-path "$work/tool" > /dev/null

cd "$work/tests/engine"
rm -f Engine/Cuda*Tests.cs
# additional-timeout is in milliseconds: a busy machine is not a hanging test. Strings are messages for people, whose words no test should hold.
echo '{ "stryker-config": { "additional-timeout": 90000, "ignore-mutations": ["string"] } }' > stryker-config.json
for folder in "$@"; do
    "$work/tool/dotnet-stryker" --test-runner mtp --configuration Release --project Rollout.Engine.csproj --mutate "**/$folder/*.cs" \
        --reporter cleartext --output "$work/$folder" --skip-version-check > "$work/$folder.log" 2>&1 || { cat "$work/$folder.log"; exit 1; }
    echo "$folder:"
    sed -n '/^All mutants have been tested/,$p' "$work/$folder.log"
done
