#!/usr/bin/env bash
# Runs Stryker.NET over a folder of the engine, in a copy, and prints what survived: file, line, the code, its replacement.
#
#   tests/mutations/stryker.sh FOLDER     Scheduling, Weights, Requests or Formats; half an hour to an hour each on 2 quiet cores
#
# A mutant runs the tests that cover it. Tests that take long and test something else are left out of the copy, and the random ones try less.
# The update transaction of the server is not among the folders: its tests run a server process, in which Stryker cannot switch mutants.
set -eu
[ $# -eq 1 ] || { sed -nE '2,/^[^#]/s/^# ?//p' "$0"; exit 2; }
folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
export DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_NOLOGO=1
work=$(mktemp -d "${TMPDIR:-/tmp}/rollout-stryker.XXXXXX")
trap 'rm -rf "$work"' EXIT
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -c --ignore-failed-read 2> /dev/null) | tar -x -C "$work"
dotnet tool install dotnet-stryker --version 5.1.0 --tool-path "$work/tool" > /dev/null

cd "$work/tests/engine"
rm -rf Tokenization Models/*Tests.cs Engine/Cuda*Tests.cs Engine/{GoldenTests,WeightFormatTests,AllocationTests}.cs
[ "$folder" = Weights ] || rm -rf Engine/{PartialUpdate,Sleep,UpdateOrder,InPlaceUpdate,WeightUpdate,PausedUpdate}Tests.cs
[ "$folder" = Weights ] || rm -rf Weights/{IncomingTensor,UpdatePreflight,PackedTensor}Tests.cs
[ "$folder" = Formats ] || rm -rf Formats
[ "$folder" = Scheduling ] || sed -i 's/iter: 200/iter: 30/' Scheduling/SchedulerTests.cs
sed -i 's/iter: 60/iter: 10/' Engine/DeterminismTests.cs
# In milliseconds: a busy machine is not a hanging test. Strings are messages for people, whose words no test should hold.
echo '{ "stryker-config": { "additional-timeout": 30000, "ignore-mutations": ["string"] } }' > stryker-config.json

"$work/tool/dotnet-stryker" --test-runner mtp --configuration Release --project Rollout.Engine.csproj --mutate "**/$folder/*.cs" \
    --reporter json --output "$work/out" --skip-version-check > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
python3 - "$work/out/reports/mutation-report.json" "/$folder/" <<'PYTHON'
import collections, json, sys
counts = collections.Counter()
for path, file in json.load(open(sys.argv[1]))["files"].items():
    if sys.argv[2] not in path:
        continue
    lines = file["source"].split("\n")
    for mutant in file["mutants"]:
        counts[mutant["status"]] += 1
        if mutant["status"] in ("Survived", "NoCoverage"):
            line = mutant["location"]["start"]["line"]
            print(f"{path.split('/')[-1]}:{line}: {lines[line - 1].strip()}\n    => {mutant.get('replacement', '').strip()}")
print(dict(counts))
PYTHON
