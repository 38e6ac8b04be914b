using System.ComponentModel;

namespace Rollout.Client;

/// <summary>
/// A sidecar that belongs to this process: <c>rollout serve</c> on a Unix socket, ready when it is returned. It ends when it is disposed
/// or this process ends.
/// </summary>
/// <remarks>
/// <code>
/// await using SidecarProcess sidecar = await SidecarProcess.StartAsync(new() { Program = "rollout.dll", ModelFolder = folder });
/// await using RolloutClient client = sidecar.Connect();
/// </code>
/// If a signal ends this process, the sidecar ends too where setpriv (util-linux) is installed; otherwise it keeps running.
/// </remarks>
public sealed class SidecarProcess : IAsyncDisposable
{
    private const int LinesKept = 40;

    private readonly SidecarOptions _options;
    private readonly ChildProcess _child;
    private readonly LastLines _lines;
    private readonly string _socket;

    private SidecarProcess(SidecarOptions options, ChildProcess child, LastLines lines, string socket)
    {
        _options = options;
        _child = child;
        _lines = lines;
        _socket = socket;
    }

    /// <summary>For <see cref="RolloutClient.Connect"/>.</summary>
    public string Address => $"unix:{_socket}";

    public int ProcessId => _child.Id;

    /// <summary>Completes with the exit code when the sidecar ends.</summary>
    public Task<int> Exited => _child.Exited;

    /// <summary>The newest lines it printed.</summary>
    public IReadOnlyList<string> LastOutput => _lines.Snapshot();

    /// <summary>Starts a sidecar and returns when it has loaded its model and serves.</summary>
    /// <exception cref="SidecarException">
    /// It cannot be started, ended before it was ready, or took longer than <see cref="SidecarOptions.ReadyTimeout"/>; has the last lines
    /// it printed.
    /// </exception>
    public static async Task<SidecarProcess> StartAsync(SidecarOptions options, CancellationToken cancellationToken = default)
    {
        string socket = options.SocketPath is { } given
            ? Path.GetFullPath(given)
            : Path.Combine(Path.GetTempPath(), $"rollout-{Environment.ProcessId}-{Guid.NewGuid():n}.sock");
        RolloutAddress.Parse($"unix:{socket}"); // reports a path that is too long before a sidecar is started

        if (options.Program.Contains('/') && !File.Exists(options.Program))
            throw new SidecarException($"there is no program {options.Program}", []);

        LastLines lines = new(LinesKept);
        (string program, List<string> arguments) = CommandLine(options, socket);
        ChildProcess child;
        try
        {
            child = await ChildProcess.StartAsync(program, arguments, line =>
            {
                lines.Add(line);
                options.OnLine?.Invoke(line);
            });
        }
        catch (Win32Exception e)
        {
            throw new SidecarException($"{program} cannot be run: {e.Message}", [], e);
        }

        SidecarProcess sidecar = new(options, child, lines, socket);
        try
        {
            await sidecar.WaitUntilReadyAsync(cancellationToken);
            return sidecar;
        }
        catch
        {
            await sidecar.DisposeAsync();
            throw;
        }
    }

    public RolloutClient Connect() => RolloutClient.Connect(Address);

    /// <summary>Sends SIGTERM to the sidecar, and kills it after <see cref="SidecarOptions.StopTimeout"/>.</summary>
    public async ValueTask DisposeAsync()
    {
        _child.Terminate();
        try
        {
            await _child.Exited.WaitAsync(_options.StopTimeout);
        }
        catch (TimeoutException)
        {
            _child.Kill();
            await _child.Exited;
        }

        _child.Dispose();
        if (File.Exists(_socket)) // a killed sidecar leaves it
            File.Delete(_socket);
    }

    /// <summary>The command to run: the executable itself, or a .dll with the .NET host.</summary>
    internal static (string Program, List<string> Arguments) CommandLine(SidecarOptions options, string socket)
    {
        List<string> arguments = ["serve", "--model", options.ModelFolder, "--socket", socket];
        if (options.Threads is { } threads)
            arguments.AddRange(["--threads", threads.ToString(System.Globalization.CultureInfo.InvariantCulture)]);
        if (options.Device is { } device)
            arguments.AddRange(["--device", device]);
        arguments.AddRange(options.ExtraArguments);
        if (!options.Program.EndsWith(".dll", StringComparison.OrdinalIgnoreCase))
            return (options.Program, arguments);
        arguments.Insert(0, options.Program);
        return (DotNetHost(), arguments);
    }

    private static string DotNetHost()
    {
        if (Environment.GetEnvironmentVariable("DOTNET_HOST_PATH") is { Length: > 0 } host)
            return host;
        return Path.GetFileNameWithoutExtension(Environment.ProcessPath) == "dotnet" ? Environment.ProcessPath! : "dotnet";
    }

    private async Task WaitUntilReadyAsync(CancellationToken cancellationToken)
    {
        await using RolloutClient client = Connect();
        using CancellationTokenSource stop = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        Task ready = client.WaitUntilReadyAsync(_options.ReadyTimeout, stop.Token);
        if (await Task.WhenAny(ready, _child.Exited) != ready)
        {
            await stop.CancelAsync();
            await ready.ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
            int code = await _child.Exited;
            throw new SidecarException($"the sidecar ended with exit code {code} before it was ready", LastOutput) { ExitCode = code };
        }

        try
        {
            await ready;
        }
        catch (RolloutException e)
        {
            throw new SidecarException(e.Message, LastOutput, e);
        }
    }
}
