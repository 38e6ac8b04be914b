using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Text.Json;
using Microsoft.AspNetCore.Connections;
using Microsoft.AspNetCore.Hosting.Server;
using Microsoft.AspNetCore.Hosting.Server.Features;
using Microsoft.AspNetCore.Server.Kestrel.Core;
using Microsoft.Extensions.Logging.Console;
using OpenTelemetry.Metrics;
using Rollout.Engine;
using Rollout.Server.Commands;
using Rollout.Server.Control;
using Rollout.Server.Grpc;
using Rollout.Server.Weights;

namespace Rollout.Server.Hosting;

/// <summary>Runs `rollout serve`: listen, load, serve, stop.</summary>
internal static class ServerApp
{
    /// <summary>Largest payload chunk that a client may send; a message is a little larger than its chunk.</summary>
    private const int MaxChunkBytes = 64 << 20;

    private static readonly TimeSpan s_drainWithin = TimeSpan.FromSeconds(10);
    private static readonly TimeSpan s_lastRepliesWithin = TimeSpan.FromMilliseconds(500);
    private static readonly TimeSpan s_engineStopsWithin = TimeSpan.FromSeconds(5);

    /// <summary>Returns the process's exit code after SIGTERM or SIGINT, or throws an exception with a readable message.</summary>
    public static async Task<int> RunAsync(ServeOptions options)
    {
        try
        {
            await ServeAsync(options);
            return ExitCode.Ok;
        }
        finally
        {
            // Kestrel removes the socket file in a normal stop; it must be removed after a failure too.
            if (options.Socket is not null) SocketFile.RemoveStale(options.Socket);
        }
    }

    private static async Task ServeAsync(ServeOptions options)
    {
        EngineHost host = new();
        await using WebApplication app = Build(options, host, ToConsole);
        ILogger logger = app.Services.GetRequiredService<ILoggerFactory>().CreateLogger("Rollout.Server");
        if (options.Socket is not null && SocketFile.RemoveStale(options.Socket)) Log.StaleSocketRemoved(logger, options.Socket);
        await StartAsync(app, options);
        try
        {
            await LoadAsync(options, app, host, logger);
            await StoppingAsync(app);
            Log.Stopping(logger);

            // A client's HTTP stack discards unread data when the connection closes.
            if (host.Stop()) await Task.Delay(s_lastRepliesWithin);
        }
        finally
        {
            host.Stop();
            await app.StopAsync();
        }

        if (host.Loaded is { } engine)
        {
            Task disposing = engine.DisposeAsync().AsTask();
            if (await Task.WhenAny(disposing, Task.Delay(s_engineStopsWithin)) != disposing)
                Log.EngineStuck(logger, s_engineStopsWithin.TotalSeconds);
        }

        Log.Stopped(logger);
    }

    /// <summary>The server before it listens, for any engine of the host.</summary>
    internal static WebApplication Build(ServeOptions options, EngineHost host, Action<ILoggingBuilder> log)
    {
        // The empty builder, so that no settings are read from files in the current folder or from the environment.
        WebApplicationBuilder builder = WebApplication.CreateEmptyBuilder(new WebApplicationOptions { ApplicationName = "rollout" });
        builder.Logging.SetMinimumLevel(LogLevel.Information);
        builder.Logging.AddFilter("Microsoft", LogLevel.Warning);
        builder.Logging.AddFilter("Grpc", LogLevel.Warning);
        builder.Logging.AddFilter("Microsoft.Extensions.Hosting", LogLevel.None); // what fails there is thrown, and reported once
        log(builder.Logging);
        builder.Services.Configure<HostOptions>(hosting => hosting.ShutdownTimeout = s_drainWithin);

        builder.WebHost.UseKestrelCore();
        builder.WebHost.ConfigureKestrel(kestrel =>
        {
            if (options.Socket is not null) kestrel.ListenUnixSocket(options.Socket, listen => listen.Protocols = HttpProtocols.Http2);
            if (options.Listen is not null) kestrel.Listen(options.Listen, listen => listen.Protocols = HttpProtocols.Http2);
            if (options.Metrics is not null) kestrel.Listen(options.Metrics, listen => listen.Protocols = HttpProtocols.Http1);
            KestrelServerLimits limits = kestrel.Limits;
            limits.MaxRequestBodySize = null;
            limits.MinRequestBodyDataRate = null;
            limits.MinResponseDataRate = null;
            limits.Http2.MaxStreamsPerConnection = 16_384; // clients may use one call for each group
            limits.Http2.MaxFrameSize = 1 << 20;
            limits.Http2.InitialStreamWindowSize = 16 << 20;
            limits.Http2.InitialConnectionWindowSize = 32 << 20;
            limits.Http2.KeepAlivePingDelay = TimeSpan.FromSeconds(30); // detects clients whose machine has crashed
            limits.Http2.KeepAlivePingTimeout = TimeSpan.FromSeconds(20);
        });

        builder.Services.AddSingleton<IMemoryPoolFactory<byte>, BlockPool>();
        builder.Services.AddSingleton(host);
        builder.Services.AddSingleton<SharedSegment>();
        builder.Services.AddSingleton<OpenUpdates>();
        builder.Services.AddSingleton<EngineControl>();
        builder.Services.AddHostedService<FaultMonitor>();
        builder.Services.AddGrpc(grpc =>
        {
            grpc.MaxReceiveMessageSize = MaxChunkBytes + (1 << 20);
            grpc.MaxSendMessageSize = null;
            grpc.Interceptors.Add<ErrorInterceptor>();
        });
        builder.Services.AddGrpcReflection();
        if (options.Metrics is not null)
        {
            builder.Services.AddOpenTelemetry().WithMetrics(metrics => metrics
                .AddMeter(EngineMetrics.MeterName, "System.Runtime", "Microsoft.AspNetCore.Server.Kestrel")
                .AddPrometheusExporter());
        }


        WebApplication app = builder.Build();
        app.MapGrpcService<RolloutGrpcService>();
        app.MapGrpcService<WeightsGrpcService>();
        app.MapGrpcService<ControlGrpcService>();
        app.MapGrpcService<HealthGrpcService>();
        app.MapGrpcReflectionService();
        if (options.Metrics is not null) app.MapPrometheusScrapingEndpoint();
        return app;
    }

    private static void ToConsole(ILoggingBuilder log)
    {
        log.AddSimpleConsole(console =>
        {
            console.SingleLine = true;
            console.TimestampFormat = "yyyy-MM-ddTHH:mm:ss.fffZ ";
            console.UseUtcTimestamp = true;
            console.ColorBehavior = LoggerColorBehavior.Disabled;
        });
        log.Services.Configure<ConsoleLoggerOptions>(console => console.LogToStandardErrorThreshold = LogLevel.Trace);
    }

    private static async Task StartAsync(WebApplication app, ServeOptions options)
    {
        try
        {
            await app.StartAsync();
        }
        catch (Exception e) when (e is IOException or SocketException)
        {
            // In use, not an address of this machine, or a port that needs privileges: the exception says which, but not always where.
            object?[] addresses = [options.Socket, options.Listen, options.Metrics];
            throw new FailureException($"cannot listen on {string.Join(" or ", addresses.Where(a => a is not null))}: {e.Message}");
        }
    }

    private static async Task LoadAsync(ServeOptions options, WebApplication app, EngineHost host, ILogger logger)
    {
        (string[] addresses, string? metrics) = Addresses(app, options);
        Log.Listening(logger, string.Join(", ", addresses), options.Model.Folder);
        if (options.Listen is { } listen && !IPAddress.IsLoopback(listen.Address)) Log.OpenToNetwork(logger, listen.ToString());

        long started = Stopwatch.GetTimestamp();
        Task<RolloutEngine> loading = ModelLoader.LoadAsync(options.Model, options.Engine);

        // The process ends while loading; nothing depends on it yet.
        if (await Task.WhenAny(loading, StoppingAsync(app)) != loading) return;

        RolloutEngine engine = await loading;
        host.Publish(engine);
        ulong version = engine.Status.Version;
        Log.Ready(logger, engine.ModelName, version, engine.Backend.Name, Stopwatch.GetElapsedTime(started).TotalSeconds);
        await WriteReadyAsync(engine, version, addresses, metrics);
    }

    /// <summary>Completes at SIGTERM or SIGINT.</summary>
    private static async Task StoppingAsync(WebApplication app)
        => await Task.Delay(Timeout.Infinite, app.Lifetime.ApplicationStopping).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);

    /// <summary>The only line on standard output, for which a parent process waits: `ready` and a JSON object.</summary>
    private static async Task WriteReadyAsync(RolloutEngine engine, ulong version, string[] addresses, string? metrics)
    {
        using MemoryStream line = new();
        line.Write("ready "u8);
        using (Utf8JsonWriter json = new(line, CommandJson.WriterOptions))
        {
            json.WriteStartObject();
            json.WriteString("model", engine.ModelName);
            json.WriteNumber("version", version);
            json.WriteString("backend", engine.Backend.Name);
            json.WriteStartArray("addresses");
            foreach (string address in addresses) json.WriteStringValue(address);
            json.WriteEndArray();
            if (metrics is not null) json.WriteString("metrics", $"{metrics}/metrics");
            json.WriteNumber("pid", Environment.ProcessId);
            json.WriteEndObject();
        }

        line.WriteByte((byte)'\n');
        using Stream output = Console.OpenStandardOutput();
        await output.WriteAsync(line.ToArray());
    }

    /// <summary>The addresses of gRPC, and the one of /metrics, which is bound last.</summary>
    private static (string[] Grpc, string? Metrics) Addresses(WebApplication app, ServeOptions options)
    {
        const string KestrelUnix = "http://unix:";
        string[] bound = [.. app.Services.GetRequiredService<IServer>().Features.Get<IServerAddressesFeature>()!.Addresses
            .Select(a => a.StartsWith(KestrelUnix, StringComparison.Ordinal) ? $"unix:{a[KestrelUnix.Length..]}" : a)];
        return options.Metrics is null ? (bound, null) : (bound[..^1], bound[^1]);
    }
}
