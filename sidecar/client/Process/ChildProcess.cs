using System.Diagnostics;

namespace Rollout.Client;

/// <summary>
/// A process that does not outlive this one: killed when this process exits and, where setpriv is installed (util-linux), also ended by
/// the kernel when a signal ends this process.
/// </summary>
internal sealed class ChildProcess : IDisposable
{
    private const string SetPriv = "/usr/bin/setpriv";

    private readonly Process _process;
    private readonly EventHandler _onProcessExit;
    private readonly TaskCompletionSource<int> _exited = new(TaskCreationOptions.RunContinuationsAsynchronously);

    private ChildProcess(Process process)
    {
        _process = process;
        _onProcessExit = (_, _) => Kill();
        AppDomain.CurrentDomain.ProcessExit += _onProcessExit;
    }

    public int Id { get; private set; }

    /// <summary>Completes with the exit code, after the last line of output.</summary>
    public Task<int> Exited => _exited.Task;

    /// <exception cref="System.ComponentModel.Win32Exception">The program cannot be run.</exception>
    public static async Task<ChildProcess> StartAsync(string program, IEnumerable<string> arguments, Action<string> onLine)
    {
        ProcessStartInfo start = new()
        {
            FileName = program,
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            UseShellExecute = false,
        };
        if (OperatingSystem.IsLinux() && File.Exists(SetPriv))
        {
            start.FileName = SetPriv;
            foreach (string argument in (string[])["--pdeathsig", "TERM", "--", program])
                start.ArgumentList.Add(argument);
        }

        foreach (string argument in arguments)
            start.ArgumentList.Add(argument);

        Process process = new() { StartInfo = start };
        process.OutputDataReceived += (_, e) => Take(e.Data);
        process.ErrorDataReceived += (_, e) => Take(e.Data);
        ChildProcess child = new(process);
        TaskCompletionSource started = new(TaskCreationOptions.RunContinuationsAsynchronously);
        // The kernel sends the death signal when the thread that forked ends, not the process. So that thread waits for the child.
        new Thread(() => child.Run(started)) { IsBackground = true, Name = "sidecar" }.Start();
        await started.Task;
        return child;

        void Take(string? line)
        {
            if (line is not null)
                onLine(line);
        }
    }

    /// <summary>Sends SIGTERM. Does nothing where it has ended.</summary>
    public void Terminate()
    {
        if (_exited.Task.IsCompleted)
            return;
        if (OperatingSystem.IsWindows())
        {
            Kill();
            return;
        }

        // .NET can only send SIGKILL; every shell has kill built in.
        using Process? kill = Process.Start(new ProcessStartInfo("/bin/sh", ["-c", $"kill -TERM {Id}"]) { RedirectStandardError = true });
        kill?.WaitForExit();
    }

    public void Kill()
    {
        try
        {
            if (!_exited.Task.IsCompleted)
                _process.Kill(entireProcessTree: true);
        }
        catch (InvalidOperationException)
        {
            // It was never started or has just ended.
        }
    }

    public void Dispose() => AppDomain.CurrentDomain.ProcessExit -= _onProcessExit;

    private void Run(TaskCompletionSource started)
    {
        try
        {
            _process.Start();
            Id = _process.Id;
            _process.StandardInput.Close();
            _process.BeginOutputReadLine();
            _process.BeginErrorReadLine();
        }
        catch (Exception e)
        {
            _exited.TrySetResult(-1);
            Dispose();
            _process.Dispose();
            started.SetException(e);
            return;
        }

        started.SetResult();
        _process.WaitForExit();
        int code = _process.ExitCode;
        _exited.TrySetResult(code);
        _process.Dispose();
    }
}
