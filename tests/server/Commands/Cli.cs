using System.Diagnostics;
using System.Text.Json;

namespace Rollout.Server.Tests;

/// <summary>The built `rollout` command, run as a user runs it.</summary>
internal static class Cli
{
    public sealed record Result(int ExitCode, string Output, string Errors)
    {
        public JsonElement Json => JsonDocument.Parse(Output).RootElement;
    }

    public static Process Create(IEnumerable<string> arguments)
    {
        string program = Path.Combine(AppContext.BaseDirectory, "rollout.dll");
        string host = Environment.GetEnvironmentVariable("DOTNET_HOST_PATH") ?? Environment.ProcessPath!;
        if (Path.GetFileNameWithoutExtension(host) != "dotnet") host = "dotnet";
        ProcessStartInfo start = new(host, ["exec", program, .. arguments])
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        return new Process { StartInfo = start };
    }

    public static Task<Result> RunAsync(params string[] arguments) => RunAsync([], arguments);

    /// <param name="variables">Of its environment.</param>
    /// <param name="arguments">After "rollout".</param>
    public static async Task<Result> RunAsync((string Name, string Value)[] variables, string[] arguments)
    {
        using Process process = Create(arguments);
        foreach ((string name, string value) in variables)
            process.StartInfo.Environment[name] = value;
        process.Start();
        Task<string> output = process.StandardOutput.ReadToEndAsync();
        Task<string> errors = process.StandardError.ReadToEndAsync();
        await process.WaitForExitAsync(new CancellationTokenSource(TimeSpan.FromSeconds(30)).Token);
        return new Result(process.ExitCode, await output, await errors);
    }
}
