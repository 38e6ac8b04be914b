using System.Collections.Concurrent;
using Grpc.Core;
using Grpc.Core.Interceptors;
using Grpc.Health.V1;
using Microsoft.AspNetCore.Builder;
using Microsoft.AspNetCore.Connections.Features;
using Microsoft.AspNetCore.Hosting;
using Microsoft.AspNetCore.Server.Kestrel.Core;
using Microsoft.Extensions.DependencyInjection;
using Microsoft.Extensions.Logging;

namespace Rollout.Client.Tests;

/// <summary>A gRPC server on a Unix socket whose answers a test determines, to test how the client handles them.</summary>
internal sealed class FakeSidecar : IAsyncDisposable
{
    private WebApplication? _app;

    public string Socket { get; } = Path.Combine(Path.GetTempPath(), $"fake-{Guid.NewGuid():n}.sock");

    public string Address => $"unix:{Socket}";

    public Func<V1.GenerateRequest, IServerStreamWriter<V1.GenerateReply>, ServerCallContext, Task>? Generate { get; set; }

    public Func<IAsyncStreamReader<V1.GenerateRequest>, IServerStreamWriter<V1.GenerateReply>, ServerCallContext, Task>? Batch { get; set; }

    public Func<V1.ScoreRequest, V1.ScoreReply>? Score { get; set; }

    public Func<V1.AbortRequest, V1.AbortReply>? Abort { get; set; }

    public Func<V1.PauseRequest, V1.PauseReply>? Pause { get; set; }

    public Func<V1.ResumeRequest, V1.ResumeReply>? Resume { get; set; }

    public Func<V1.SleepRequest, V1.SleepReply>? Sleep { get; set; }

    public Func<V1.WakeUpRequest, V1.WakeUpReply>? WakeUp { get; set; }

    /// <summary>How often each method was called, by its name.</summary>
    public ConcurrentDictionary<string, int> Calls { get; } = new();

    /// <summary>Runs when a call has arrived, before anything is done.</summary>
    public Func<ServerCallContext, Task>? Arrived { get; set; }

    /// <summary>Runs when the work of a call with one answer is done, before the answer leaves.</summary>
    public Func<ServerCallContext, Task>? Done { get; set; }

    public HealthCheckResponse.Types.ServingStatus Health { get; set; } = HealthCheckResponse.Types.ServingStatus.Serving;

    public FakeWeights Weights { get; } = new();

    public static async Task<FakeSidecar> StartAsync()
    {
        FakeSidecar fake = new();
        await fake.ListenAsync();
        return fake;
    }

    public async Task ListenAsync()
    {
        WebApplicationBuilder builder = WebApplication.CreateSlimBuilder();
        builder.Logging.ClearProviders();
        builder.WebHost.ConfigureKestrel(kestrel => kestrel.ListenUnixSocket(Socket, listen => listen.Protocols = HttpProtocols.Http2));
        builder.Services.AddGrpc(options => options.Interceptors.Add<Watch>(this));
        builder.Services.AddSingleton(this);
        _app = builder.Build();
        _app.MapGrpcService<RolloutService>();
        _app.MapGrpcService<ControlService>();
        _app.MapGrpcService<WeightsService>();
        _app.MapGrpcService<HealthService>();
        await _app.StartAsync();
    }

    /// <summary>Simulates a crashed machine: the connection ends silently, and pending answers are lost.</summary>
    public static void Cut(ServerCallContext context) =>
        context.GetHttpContext().Features.Get<IConnectionLifetimeFeature>()!.Abort();

    /// <summary>Never answers.</summary>
    public static Task HangAsync(ServerCallContext context) => Task.Delay(Timeout.Infinite, context.CancellationToken);

    /// <summary>Simulates a killed process: calls break, and nothing answers.</summary>
    public async Task DieAsync()
    {
        if (_app is null)
            return;
        using CancellationTokenSource now = new();
        await now.CancelAsync();
        try
        {
            await _app.StopAsync(now.Token);
        }
        catch (OperationCanceledException)
        {
        }

        await _app.DisposeAsync();
        _app = null;
    }

    public async ValueTask DisposeAsync()
    {
        await DieAsync();
        File.Delete(Socket);
    }

    private sealed class Watch(FakeSidecar fake) : Interceptor
    {
        public override async Task<TResponse> UnaryServerHandler<TRequest, TResponse>(
            TRequest request, ServerCallContext context, UnaryServerMethod<TRequest, TResponse> continuation)
        {
            await ArriveAsync(context);
            TResponse response = await continuation(request, context);
            if (fake.Done is { } done)
                await done(context);
            return response;
        }

        public override async Task ServerStreamingServerHandler<TRequest, TResponse>(
            TRequest request,
            IServerStreamWriter<TResponse> responseStream,
            ServerCallContext context,
            ServerStreamingServerMethod<TRequest, TResponse> continuation)
        {
            await ArriveAsync(context);
            await continuation(request, responseStream, context);
        }

        public override async Task DuplexStreamingServerHandler<TRequest, TResponse>(
            IAsyncStreamReader<TRequest> requestStream,
            IServerStreamWriter<TResponse> responseStream,
            ServerCallContext context,
            DuplexStreamingServerMethod<TRequest, TResponse> continuation)
        {
            await ArriveAsync(context);
            await continuation(requestStream, responseStream, context);
        }

        private Task ArriveAsync(ServerCallContext context)
        {
            fake.Calls.AddOrUpdate(context.Method[(context.Method.LastIndexOf('/') + 1)..], 1, (_, count) => count + 1);
            return fake.Arrived?.Invoke(context) ?? Task.CompletedTask;
        }
    }

    private sealed class RolloutService(FakeSidecar fake) : V1.RolloutService.RolloutServiceBase
    {
        public override Task Generate(
            V1.GenerateRequest request, IServerStreamWriter<V1.GenerateReply> responseStream, ServerCallContext context) =>
            fake.Generate!(request, responseStream, context);

        public override Task GenerateBatch(
            IAsyncStreamReader<V1.GenerateRequest> requestStream,
            IServerStreamWriter<V1.GenerateReply> responseStream,
            ServerCallContext context) => fake.Batch!(requestStream, responseStream, context);

        public override Task<V1.ScoreReply> Score(V1.ScoreRequest request, ServerCallContext context) =>
            Task.FromResult(fake.Score!(request));

        public override Task<V1.AbortReply> Abort(V1.AbortRequest request, ServerCallContext context) =>
            Task.FromResult(fake.Abort!(request));
    }

    private sealed class ControlService(FakeSidecar fake) : V1.ControlService.ControlServiceBase
    {
        public override Task<V1.StatusReply> Status(V1.StatusRequest request, ServerCallContext context) =>
            Task.FromResult(fake.Weights.Status());

        public override Task<V1.PauseReply> Pause(V1.PauseRequest request, ServerCallContext context) =>
            Task.FromResult(fake.Pause!(request));

        public override Task<V1.ResumeReply> Resume(V1.ResumeRequest request, ServerCallContext context) =>
            Task.FromResult(fake.Resume!(request));

        public override Task<V1.SleepReply> Sleep(V1.SleepRequest request, ServerCallContext context) =>
            Task.FromResult(fake.Sleep!(request));

        public override Task<V1.WakeUpReply> WakeUp(V1.WakeUpRequest request, ServerCallContext context) =>
            Task.FromResult(fake.WakeUp!(request));
    }

    private sealed class WeightsService(FakeSidecar fake) : V1.WeightsService.WeightsServiceBase
    {
        public override Task<V1.DescribeReply> Describe(V1.DescribeRequest request, ServerCallContext context) =>
            Task.FromResult(fake.Weights.Describe());

        public override Task Update(
            IAsyncStreamReader<V1.UpdateRequest> requestStream,
            IServerStreamWriter<V1.UpdateReply> responseStream,
            ServerCallContext context) => fake.Weights.UpdateAsync(requestStream, responseStream, context);
    }

    private sealed class HealthService(FakeSidecar fake) : Grpc.Health.V1.Health.HealthBase
    {
        public override Task<HealthCheckResponse> Check(HealthCheckRequest request, ServerCallContext context) =>
            Task.FromResult(new HealthCheckResponse { Status = fake.Health });
    }
}
