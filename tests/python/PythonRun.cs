using System.ComponentModel;
using System.Diagnostics;
using System.Reflection;
using System.Text.Json;
using Xunit;

[assembly: AssemblyFixture(typeof(Rollout.Python.Tests.PythonRun))]

namespace Rollout.Python.Tests;

/// <summary>One run of run.py over all tests of this folder, and the result of each.</summary>
public sealed class PythonRun : IAsyncLifetime
{
    private const string Modules = "grpc, google.protobuf, numpy";

    private static readonly TimeSpan s_patience = TimeSpan.FromMinutes(15);

    private readonly Dictionary<string, Result> _results = [];

    public sealed record Result(string Test, string Outcome, string Message, double Seconds);

    public static string Folder { get; } = Metadata("PythonTests");

    /// <summary>Why the tests could not run; null where they ran.</summary>
    public string? SkipReason { get; private set; }

    /// <summary>What was printed beside the results.</summary>
    public string Errors { get; private set; } = "";

    public Result? Of(string test) => _results.GetValueOrDefault(test);

    public async ValueTask InitializeAsync()
    {
        if (await FindPythonAsync() is not { } python)
        {
            SkipReason = $"no python3 here can import {Modules}; README says how to install them";
            return;
        }

        (int code, string output, string errors) = await RunAsync(python, "-W", "error::SyntaxWarning", "run.py");
        Errors = code == 0 ? errors : $"run.py ended with exit code {code}\n{errors}";
        foreach (string line in output.Split('\n').Where(line => line.StartsWith('{')))
        {
            Result result = JsonSerializer.Deserialize<Result>(line, JsonSerializerOptions.Web)!;
            _results[result.Test] = result;
        }
    }

    public ValueTask DisposeAsync() => ValueTask.CompletedTask;

    /// <summary>The first python that has the modules: the user's own, then the distribution's.</summary>
    private static async Task<string?> FindPythonAsync()
    {
        foreach (string python in (string[])["python3", "/usr/bin/python3"])
        {
            try
            {
                if ((await RunAsync(python, "-c", $"import {Modules}")).Code == 0) return python;
            }
            catch (Win32Exception)
            {
                // There is none.
            }
        }

        return null;
    }

    private static async Task<(int Code, string Output, string Errors)> RunAsync(string program, params string[] arguments)
    {
        ProcessStartInfo start = new(program, arguments)
        {
            WorkingDirectory = Folder,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        start.Environment["ROLLOUT_PROGRAM"] = Metadata("RolloutProgram");
        start.Environment["PYTHONDONTWRITEBYTECODE"] = "1";
        using Process process = Process.Start(start)!;
        Task<string> output = process.StandardOutput.ReadToEndAsync();
        Task<string> errors = process.StandardError.ReadToEndAsync();
        using CancellationTokenSource patience = new(s_patience);
        try
        {
            await process.WaitForExitAsync(patience.Token);
        }
        catch (OperationCanceledException)
        {
            process.Kill(entireProcessTree: true);
        }

        return (process.HasExited ? process.ExitCode : -1, await output, await errors);
    }

    private static string Metadata(string key) => typeof(PythonRun).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
        .Single(attribute => attribute.Key == key).Value!;
}
