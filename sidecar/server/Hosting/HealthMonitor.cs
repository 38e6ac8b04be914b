using Grpc.Health.V1;
using Grpc.HealthCheck;
using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Hosting;

/// <summary>
/// Keeps grpc.health.v1 in step with the engine. The server as a whole and the services that need weights follow the engine; control
/// answers as long as the process does.
/// </summary>
internal sealed class HealthMonitor(EngineHost host, HealthServiceImpl health, ILogger<HealthMonitor> logger) : BackgroundService
{
    private static readonly TimeSpan s_period = TimeSpan.FromMilliseconds(100);

    private static readonly string[] s_followEngine =
    [
        "",
        RolloutService.Descriptor.FullName,
        WeightsService.Descriptor.FullName,
    ];

    private readonly Lock _lock = new();
    private bool? _served;

    /// <summary>Brings health up to date now. Called where a change is known, so that nobody has to wait for the next look.</summary>
    public void Refresh()
    {
        lock (_lock)
        {
            bool serving = host.Serving;
            if (_served == serving) return;
            if (_served is null) health.SetStatus(ControlService.Descriptor.FullName, HealthCheckResponse.Types.ServingStatus.Serving);
            _served = serving;
            foreach (string service in s_followEngine)
            {
                health.SetStatus(service,
                    serving ? HealthCheckResponse.Types.ServingStatus.Serving : HealthCheckResponse.Types.ServingStatus.NotServing);
            }
        }

        if (host.Loaded?.Status is { State: Engine.EngineState.Faulted } status) Log.Faulted(logger, status.Reason);
    }

    protected override async Task ExecuteAsync(CancellationToken stoppingToken)
    {
        using PeriodicTimer timer = new(s_period);
        while (await timer.WaitForNextTickAsync(stoppingToken)) Refresh();
    }
}
