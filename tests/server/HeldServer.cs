using System.Collections.Concurrent;
using Microsoft.AspNetCore.Builder;
using Microsoft.Extensions.Logging;
using Rollout.Engine;
using Rollout.Engine.Tests;
using Rollout.Kernels;
using Rollout.Server.Hosting;

namespace Rollout.Server.Tests;

/// <summary>
/// The server of `rollout serve` in this process, with its socket, and its engine on a device that a test can hold between two steps or
/// make fail.
/// </summary>
internal sealed class HeldServer : TestServer, IAsyncDisposable
{
    private readonly TemporaryFolder _folder;
    private readonly WebApplication _app;

    private HeldServer(
        TemporaryFolder folder, WebApplication app, EngineHost host, RolloutEngine engine, ScriptedBackend device, LogLines log)
        : base($"unix:{folder["s"]}")
        => (_folder, _app, Host, Engine, Device, Log) = (folder, app, host, engine, device, log);

    /// <summary>Few seats, and the blocks that they need.</summary>
    public static EngineOptions Small { get; } = new() { KvCacheBytes = 8 << 20, MaxSequences = 4 };

    public EngineHost Host { get; }

    public RolloutEngine Engine { get; }

    public ScriptedBackend Device { get; }

    /// <summary>Its log.</summary>
    public LogLines Log { get; }

    /// <param name="options">Options of the engine.</param>
    /// <param name="loaded">If false, the engine exists but the server still reports loading.</param>
    public static async Task<HeldServer> StartAsync(EngineOptions? options = null, bool loaded = true)
    {
        TemporaryFolder folder = new();
        LogLines log = new();
        EngineHost host = new();
        ServeOptions serve = new()
        {
            Model = new ModelSource(Golden.Folder("qwen3"), "cpu", Threads: 1, WeightFormat.BFloat16, "bytes"),
            Engine = options ?? Small,
            Socket = folder["s"],
        };
        WebApplication app = ServerApp.Build(serve, host, logging => logging.AddProvider(log));
        ScriptedBackend device = new();
        RolloutEngine engine = RolloutEngine.Load(serve.Model.Folder, device, serve.Engine, new ByteTokenizer());
        await app.StartAsync();
        if (loaded) host.Publish(engine);
        return new HeldServer(folder, app, host, engine, device, log);
    }

    /// <summary>A group that has begun, each of its samples with a few tokens, and a pause that keeps it there.</summary>
    public async Task<Task<List<V1.SampleChunk>>> BeginAndPauseAsync(V1.GenerateRequest request)
    {
        Device.HoldAfter(3);
        Task<List<V1.SampleChunk>> begun = this.SamplesAsync(request);
        await Task.Run(Device.WaitUntilHeld);
        Task<PauseResult> paused = Engine.PauseAsync(PauseMode.Keep, "test", TimeSpan.FromMinutes(1)); // posted before the loop is released
        Device.LetGo();
        await paused;
        return begun;
    }

    public async ValueTask DisposeAsync()
    {
        Channel.Dispose();
        Host.Stop();
        await _app.StopAsync();
        await _app.DisposeAsync();
        await Engine.DisposeAsync();
        _folder.Dispose();
    }

    internal sealed class LogLines : ILoggerProvider, ILogger
    {
        private readonly ConcurrentQueue<(int Event, string Text)> _lines = new();

        public IReadOnlyCollection<(int Event, string Text)> Lines => _lines;

        public ILogger CreateLogger(string categoryName) => this;

        public bool IsEnabled(LogLevel logLevel) => logLevel >= LogLevel.Information;

        public IDisposable? BeginScope<TState>(TState state)
            where TState : notnull => null;

        public void Log<TState>(
            LogLevel logLevel, EventId eventId, TState state, Exception? exception, Func<TState, Exception?, string> formatter)
            => _lines.Enqueue((eventId.Id, formatter(state, exception)));

        public void Dispose()
        {
        }
    }
}
