using System.Diagnostics;
using System.Globalization;
using System.Reflection;

namespace Rollout.Server.Tests;

/// <summary>tests/trainer in a process of its own, one step at a time.</summary>
internal sealed class TrainerProcess : IAsyncDisposable
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(30);

    private static readonly string s_program = typeof(TrainerProcess).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
        .Single(entry => entry.Key == "TrainerProgram").Value!;

    private readonly Process _process;

    private TrainerProcess(Process process) => _process = process;

    public int Id => _process.Id;

    /// <param name="server">The server to push to.</param>
    /// <param name="how">"push" or "publish"; see the program.</param>
    /// <param name="folder">The folder whose model.safetensors is pushed.</param>
    /// <param name="route">inline, shm, file or ipc.</param>
    /// <param name="mode">staged or inplace.</param>
    /// <param name="number">Number of messages of a push, or timeout in seconds of a publish.</param>
    /// <param name="under">A shell command that sets limits before the program starts, or nothing.</param>
    /// <param name="disk">Folder for files.</param>
    /// <param name="variables">Of its environment, beside this process's.</param>
    public static TrainerProcess Start(ServerProcess server, string how, string folder, string route, string mode, int number,
        string under = "", string disk = "", IEnumerable<(string Name, string Value)>? variables = null)
    {
        string host = Environment.GetEnvironmentVariable("DOTNET_HOST_PATH") ?? "dotnet";
        string count = number.ToString(CultureInfo.InvariantCulture);
        string[] command = ["exec", s_program, how, server.SocketPath, Path.Combine(folder, "model.safetensors"), route, mode, count, disk];
        ProcessStartInfo start = under.Length == 0
            ? new(host, command)
            : new("/bin/sh", ["-c", $"{under}; exec \"$@\"", "sh", host, .. command]);
        start.RedirectStandardInput = true;
        start.RedirectStandardOutput = true;
        start.RedirectStandardError = true;
        // A limit on file sizes would also apply to the memory that .NET maps twice for W^X.
        if (under.Length > 0) start.Environment["DOTNET_EnableWriteXorExecute"] = "0";
        foreach ((string name, string value) in variables ?? []) start.Environment[name] = value;
        return new TrainerProcess(Process.Start(start)!);
    }

    /// <summary>One that only has a buffer on a simulated device, as large as a file: see DeviceHolder.</summary>
    public static TrainerProcess Hold(string file, int device, IEnumerable<(string Name, string Value)> variables)
    {
        ProcessStartInfo start = new(
            Environment.GetEnvironmentVariable("DOTNET_HOST_PATH") ?? "dotnet",
            ["exec", s_program, "hold", file, device.ToString(CultureInfo.InvariantCulture)])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        foreach ((string name, string value) in variables) start.Environment[name] = value;
        return new TrainerProcess(Process.Start(start)!);
    }

    /// <summary>One on another simulated device than the server's: see RanksTrainer.</summary>
    public static TrainerProcess OnDevice(
        IEnumerable<(string Name, string Value)> variables, string how, params IEnumerable<string> arguments)
    {
        ProcessStartInfo start = new(
            Environment.GetEnvironmentVariable("DOTNET_HOST_PATH") ?? "dotnet", ["exec", s_program, how, .. arguments])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        foreach ((string name, string value) in variables) start.Environment[name] = value;
        return new TrainerProcess(Process.Start(start)!);
    }

    public void Signal(string name)
    {
        using Process kill = Process.Start("kill", [$"-{name}", Id.ToString(CultureInfo.InvariantCulture)]);
        kill.WaitForExit();
    }

    /// <summary>Gives it a line, if there is one, and returns its next.</summary>
    public async Task<string> AskAsync(string? line = null)
    {
        if (line is not null) await TellAsync(line);
        return await LineAsync() ?? throw new InvalidOperationException(await _process.StandardError.ReadToEndAsync());
    }

    public Task TellAsync(string line) => _process.StandardInput.WriteLineAsync(line);

    /// <summary>Lets it go on until it waits at this step.</summary>
    public async Task ToAsync(string step)
    {
        while (await LineAsync() is { } line)
        {
            if (line == $"step {step}") return;
            Assert.StartsWith("step ", line, StringComparison.Ordinal);
            await GoOnAsync();
        }

        Assert.Fail($"the trainer ended before '{step}': {await _process.StandardError.ReadToEndAsync()}");
    }

    /// <summary>Lets it go on from the step it waits at.</summary>
    public Task GoOnAsync() => _process.StandardInput.WriteLineAsync();

    /// <summary>Lets it go on to its end. Its last line.</summary>
    public async Task<string> EndAsync()
    {
        while (await LineAsync() is { } line)
        {
            if (!line.StartsWith("step ", StringComparison.Ordinal)) return line;
            await GoOnAsync();
        }

        return $"nothing: {await _process.StandardError.ReadToEndAsync()}";
    }

    /// <summary>Kills it with SIGKILL; returns when it has ended.</summary>
    public async Task KillAsync()
    {
        _process.Kill();
        await _process.WaitForExitAsync();
    }

    public async ValueTask DisposeAsync()
    {
        if (!_process.HasExited) await KillAsync();
        _process.Dispose();
    }

    private Task<string?> LineAsync() => _process.StandardOutput.ReadLineAsync().WaitAsync(s_patience);
}
