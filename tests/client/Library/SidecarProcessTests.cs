using System.Diagnostics;
using Xunit;

namespace Rollout.Client.Tests;

/// <summary>Shell scripts instead of a sidecar; the tests of the server use the real one.</summary>
public sealed class SidecarProcessTests : IDisposable
{
    private readonly string _folder = Directory.CreateTempSubdirectory("sidecar-").FullName;

    private static CancellationToken Token => TestContext.Current.CancellationToken;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Fact]
    public async Task Ending_before_it_is_ready_shows_its_last_lines()
    {
        string program = Script("echo \"got: $*\"; echo 'no such model' >&2; exit 3");
        List<string> lines = [];
        SidecarException error = await Assert.ThrowsAsync<SidecarException>(() => SidecarProcess.StartAsync(
            new SidecarOptions
            {
                Program = program,
                ModelFolder = "/models/x",
                SocketPath = "/tmp/s.sock",
                Threads = 2,
                ExtraArguments = ["--max-context", "64"],
                OnLine = line =>
                {
                    lock (lines)
                        lines.Add(line);
                },
            },
            Token));
        Assert.Equal(3, error.ExitCode);
        Assert.Contains("exit code 3", error.Message);
        Assert.Contains("no such model", error.Message);
        Assert.Contains("got: serve --model /models/x --socket /tmp/s.sock --threads 2 --max-context 64", error.LastLines);
        Assert.Equal(2, lines.Count);
    }

    [Fact]
    public async Task One_that_is_never_ready_is_ended_even_if_it_ignores_being_asked()
    {
        string pidFile = Path.Combine(_folder, "pid");
        string program = Script($"trap '' TERM; echo $$ > {pidFile}; echo loading; while true; do sleep 0.1; done");
        SidecarException error = await Assert.ThrowsAsync<SidecarException>(() => SidecarProcess.StartAsync(
            new SidecarOptions
            {
                Program = program,
                ModelFolder = "x",
                ReadyTimeout = TimeSpan.FromSeconds(1),
                StopTimeout = TimeSpan.FromSeconds(0.3),
            },
            Token));
        Assert.Contains("was not ready after 1 s", error.Message);
        Assert.Contains("loading", error.Message);
        Assert.False(Directory.Exists($"/proc/{File.ReadAllText(pidFile).Trim()}"));
    }

    [Fact]
    public async Task Cancelling_the_start_ends_it()
    {
        using CancellationTokenSource cancel = new();
        string program = Script("echo $$; exec sleep 100");
        string pid = "";
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => SidecarProcess.StartAsync(
            new SidecarOptions
            {
                Program = program,
                ModelFolder = "x",
                OnLine = line =>
                {
                    pid = line;
                    cancel.Cancel();
                },
            },
            cancel.Token));
        Assert.NotEqual("", pid);
        Assert.False(Directory.Exists($"/proc/{pid}"));
    }

    [Fact]
    public async Task A_program_that_is_not_there_is_named()
    {
        SidecarOptions options = new() { Program = "/no/such/rollout", ModelFolder = "x" };
        SidecarException error = await Assert.ThrowsAsync<SidecarException>(() => SidecarProcess.StartAsync(options, Token));
        Assert.Contains("/no/such/rollout", error.Message);
    }

    [Fact]
    public async Task Output_is_kept_to_its_end_and_the_exit_code_is_known()
    {
        List<string> lines = [];
        using ChildProcess child = await ChildProcess.StartAsync("/bin/sh", ["-c", "echo out; echo err >&2; exit 5"], line =>
        {
            lock (lines)
                lines.Add(line);
        });
        Assert.Equal(5, await child.Exited.WaitAsync(TimeSpan.FromSeconds(20), Token));
        Assert.Equal(["err", "out"], lines.Order());
        child.Terminate();
        child.Kill();
    }

    [Fact]
    public async Task Asking_is_enough_for_one_that_listens()
    {
        TaskCompletionSource ready = new();
        using ChildProcess child = await ChildProcess.StartAsync(
            "/bin/sh", ["-c", "trap 'exit 7' TERM; echo ready; while true; do sleep 0.1; done"], _ => ready.TrySetResult());
        await ready.Task.WaitAsync(TimeSpan.FromSeconds(20), Token);
        child.Terminate();
        Assert.Equal(7, await child.Exited.WaitAsync(TimeSpan.FromSeconds(20), Token));
    }

    [Fact]
    public async Task A_socket_that_a_killed_one_left_is_removed()
    {
        string socket = Path.Combine(_folder, "s.sock");
        string program = Script($"touch {socket}; echo $$; kill -9 $$");
        await Assert.ThrowsAsync<SidecarException>(() =>
            SidecarProcess.StartAsync(new SidecarOptions { Program = program, ModelFolder = "x", SocketPath = socket }, Token));
        Assert.False(File.Exists(socket));
    }

    [Fact]
    public void A_dll_is_run_by_the_dotnet_host()
    {
        (string program, List<string> arguments) = SidecarProcess.CommandLine(
            new SidecarOptions { Program = "/opt/rollout.dll", ModelFolder = "/m" }, "/s");
        Assert.Equal("dotnet", Path.GetFileNameWithoutExtension(program));
        Assert.Equal(["/opt/rollout.dll", "serve", "--model", "/m", "--socket", "/s"], arguments);
        (program, arguments) = SidecarProcess.CommandLine(
            new SidecarOptions { Program = "/opt/rollout", ModelFolder = "/m", Threads = 3, Device = "cuda:1", ExtraArguments = ["--x"] },
            "/s");
        Assert.Equal("/opt/rollout", program);
        Assert.Equal(["serve", "--model", "/m", "--socket", "/s", "--threads", "3", "--device", "cuda:1", "--x"], arguments);
    }

    private string Script(string body)
    {
        string path = Path.Combine(_folder, "program.sh");
        File.WriteAllText(path, $"#!/bin/sh\n{body}\n");
        // With the chmod program, so that this process has no handle open for writing when the script is run.
        using Process chmod = Process.Start("chmod", ["+x", path]);
        chmod.WaitForExit();
        return path;
    }
}
