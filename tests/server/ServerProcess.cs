using System.Diagnostics;
using System.Globalization;
using System.Text;
using System.Text.Json;

namespace Rollout.Server.Tests;

/// <summary>A real `rollout serve` in its own process, on a Unix socket in its own folder.</summary>
public sealed class ServerProcess : TestServer, IAsyncDisposable
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(30);

    private readonly string[] _command;
    private readonly (string Name, string Value)[] _variables; // of its environment
    private readonly string _folder;
    private readonly StringBuilder _log = new();
    private Process _process = null!;
    private TaskCompletionSource<string> _ready = null!;

    private ServerProcess(string[] command, string folder, string address, (string Name, string Value)[] variables)
        : base(address)
    {
        _command = command;
        _variables = variables;
        _folder = folder;
    }

    public string SocketPath => Path.Combine(_folder, "s");

    public int Id => _process.Id;

    /// <summary>VmRSS: the resident memory of the process.</summary>
    public double ResidentBytes
    {
        get
        {
            const string Field = "VmRSS:";
            string line = File.ReadLines($"/proc/{Id}/status").First(line => line.StartsWith(Field, StringComparison.Ordinal));
            return 1024 * double.Parse(line.AsSpan(Field.Length, line.Length - Field.Length - "kB".Length), CultureInfo.InvariantCulture);
        }
    }

    /// <summary>The object after `ready` on standard output.</summary>
    public JsonElement Ready { get; private set; }

    /// <summary>What it has written to standard error so far.</summary>
    public string Log
    {
        get
        {
            lock (_log) return _log.ToString();
        }
    }

    /// <summary>Starts a server and waits until it says that it is ready.</summary>
    public static Task<ServerProcess> StartAsync(string model = "qwen3", params string[] arguments)
        => ReadyAsync(Launch(Golden.Folder(model), arguments, variables: []));

    /// <summary>The same, with variables of its environment set.</summary>
    public static Task<ServerProcess> StartAsync(string model, (string Name, string Value)[] variables, params string[] arguments)
        => ReadyAsync(Launch(Golden.Folder(model), arguments, variables));

    private static async Task<ServerProcess> ReadyAsync(ServerProcess server)
    {
        try
        {
            await server.ReadyAsync();
            return server;
        }
        catch (Exception e)
        {
            await server.DisposeAsync();
            throw new InvalidOperationException($"the server did not get ready: {server.Log}", e);
        }
    }

    /// <summary>Starts a server and does not wait.</summary>
    public static ServerProcess Launch(string folder, params string[] arguments) => Launch(folder, arguments, variables: []);

    private static ServerProcess Launch(string folder, string[] arguments, (string Name, string Value)[] variables)
    {
        string own = Directory.CreateTempSubdirectory("rs-").FullName;
        string socket = Path.Combine(own, "s");
        ServerProcess server = new(
            ["serve", "--model", folder, "--socket", socket, "--threads", "1", .. arguments], own, $"unix:{socket}", variables);
        server.Start();
        return server;
    }

    /// <summary>Kills it, as a crash would; returns when it has ended.</summary>
    public async Task KillAsync()
    {
        _process.Kill();
        await _process.WaitForExitAsync();
    }

    /// <summary>After it has ended, starts the same command on the same socket; returns when it is ready.</summary>
    public async Task StartAgainAsync()
    {
        _process.Dispose();
        Start();
        await ReadyAsync();
    }

    private void Start()
    {
        TaskCompletionSource<string> ready = _ready = new TaskCompletionSource<string>(TaskCreationOptions.RunContinuationsAsynchronously);
        _process = Cli.Create(_command);
        foreach ((string name, string value) in _variables) _process.StartInfo.Environment[name] = value;
        _process.OutputDataReceived += (_, line) =>
        {
            if (line.Data is null) ready.TrySetException(new InvalidOperationException("it ended"));
            else if (line.Data.StartsWith("ready ", StringComparison.Ordinal)) ready.TrySetResult(line.Data);
        };
        _process.ErrorDataReceived += (_, line) =>
        {
            lock (_log) _log.AppendLine(line.Data);
        };
        _process.Start();
        _process.BeginOutputReadLine();
        _process.BeginErrorReadLine();
    }

    private async Task ReadyAsync()
    {
        string line = await _ready.Task.WaitAsync(s_patience);
        Ready = JsonDocument.Parse(line["ready ".Length..]).RootElement;
    }

    public void Signal(string name)
    {
        string id = _process.Id.ToString(CultureInfo.InvariantCulture);
        using Process shell = Process.Start("/bin/sh", ["-c", $"kill -{name} {id}"]);
        shell.WaitForExit();
    }

    /// <summary>Waits for the end and returns the exit code.</summary>
    public async Task<int> ExitAsync()
    {
        using CancellationTokenSource patience = new(s_patience);
        await _process.WaitForExitAsync(patience.Token);
        return _process.ExitCode;
    }

    public async ValueTask DisposeAsync()
    {
        Channel.Dispose();
        if (!_process.HasExited) _process.Kill();
        await _process.WaitForExitAsync();
        _process.Dispose();
        Directory.Delete(_folder, recursive: true);
    }
}
