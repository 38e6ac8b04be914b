using Grpc.Core;
using Grpc.Health.V1;
using Rollout.Server.Hosting;
using Rollout.V1;
using ServingStatus = Grpc.Health.V1.HealthCheckResponse.Types.ServingStatus;

namespace Rollout.Server.Grpc;

/// <summary>
/// grpc.health.v1, computed from the engine's state at every call. The server as a whole and the weights service follow the engine;
/// generation also needs weights that are awake and not poisoned; control is serving as long as the process runs.
/// </summary>
internal sealed class HealthGrpcService(EngineHost host) : Health.HealthBase
{
    private static readonly TimeSpan s_watchPeriod = TimeSpan.FromMilliseconds(100);

    public override Task<HealthCheckResponse> Check(HealthCheckRequest request, ServerCallContext context)
    {
        ServingStatus status = Of(request.Service);
        if (status == ServingStatus.ServiceUnknown)
            throw new RpcException(new Status(StatusCode.NotFound, $"there is no service '{request.Service}'"));
        return Task.FromResult(new HealthCheckResponse { Status = status });
    }

    /// <summary>The status now, and whenever it changes. Ends when the server stops, so that a watcher does not delay that.</summary>
    public override async Task Watch(
        HealthCheckRequest request, IServerStreamWriter<HealthCheckResponse> responseStream, ServerCallContext context)
    {
        using CancellationTokenSource ending = CancellationTokenSource.CreateLinkedTokenSource(context.CancellationToken, host.Stopping);
        using PeriodicTimer timer = new(s_watchPeriod);
        ServingStatus? said = null;
        while (true)
        {
            ServingStatus status = Of(request.Service);
            if (said != status) await responseStream.WriteAsync(new HealthCheckResponse { Status = status }, context.CancellationToken);
            said = status;
            if (host.Stopping.IsCancellationRequested) return;
            try
            {
                await timer.WaitForNextTickAsync(ending.Token);
            }
            catch (OperationCanceledException) when (!context.CancellationToken.IsCancellationRequested)
            {
                // Stopping: report the status once more.
            }
        }
    }

    private ServingStatus Of(string service)
    {
        if (service == ControlService.Descriptor.FullName) return ServingStatus.Serving;
        bool known = service.Length == 0 || service == RolloutService.Descriptor.FullName || service == WeightsService.Descriptor.FullName;
        if (!known) return ServingStatus.ServiceUnknown;
        bool generates = host.Loaded?.Status.State is not (Engine.EngineState.Sleeping or Engine.EngineState.Poisoned);
        bool serving = host.Serving && (generates || service != RolloutService.Descriptor.FullName);
        return serving ? ServingStatus.Serving : ServingStatus.NotServing;
    }
}
