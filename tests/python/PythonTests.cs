using System.Text.RegularExpressions;
using Xunit;

namespace Rollout.Python.Tests;

/// <summary>Every Python test of this folder as a test of its own, so that `dotnet test` runs and counts them.</summary>
public sealed partial class PythonTests(PythonRun run)
{
    /// <summary>
    /// Named as unittest does: file.class.method. Read from the files, so that a test which does not run cannot go unnoticed.
    /// </summary>
    public static TheoryData<string> Tests
    {
        get
        {
            TheoryData<string> tests = [];
            foreach (string file in Directory.GetFiles(PythonRun.Folder, "test_*.py").Order(StringComparer.Ordinal))
            {
                string owner = "";
                foreach (string line in File.ReadLines(file))
                {
                    if (Class().Match(line) is { Success: true } type) owner = type.Groups[1].Value;
                    else if (Method().Match(line) is { Success: true } method)
                        tests.Add($"{Path.GetFileNameWithoutExtension(file)}.{owner}.{method.Groups[1].Value}");
                }
            }

            return tests;
        }
    }

    /// <summary>Runs without Python too, because a project in which every test is skipped counts as a failure.</summary>
    [Fact]
    public void Every_file_has_tests()
    {
        string[] tests = [.. Tests.Select(row => row.Data)];
        Assert.Equal(tests.Distinct(), tests);
        Assert.All(Directory.GetFiles(PythonRun.Folder, "test_*.py"), file =>
            Assert.Contains(tests, test => test.StartsWith(Path.GetFileNameWithoutExtension(file) + ".", StringComparison.Ordinal)));
    }

    [Theory, MemberData(nameof(Tests))]
    public void Python(string test)
    {
        if (run.SkipReason is { } reason) Assert.Skip(reason);
        PythonRun.Result? result = run.Of(test);
        if (result is null) Assert.Fail($"it was not run\n{run.Errors}");
        if (result.Outcome == "skipped") Assert.Skip(result.Message);
        Assert.True(result.Outcome == "passed", result.Message);
    }

    [GeneratedRegex(@"^class (\w+)")]
    private static partial Regex Class();

    [GeneratedRegex(@"^    def (test_\w+)")]
    private static partial Regex Method();
}
