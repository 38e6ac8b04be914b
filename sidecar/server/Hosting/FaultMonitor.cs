using Rollout.Engine;

namespace Rollout.Server.Hosting;

/// <summary>Logs once that the engine has failed; failed calls report it only to their clients.</summary>
internal sealed class FaultMonitor(EngineHost host, ILogger<FaultMonitor> logger) : BackgroundService
{
    private static readonly TimeSpan s_period = TimeSpan.FromSeconds(1);

    protected override async Task ExecuteAsync(CancellationToken stoppingToken)
    {
        using PeriodicTimer timer = new(s_period);
        while (await timer.WaitForNextTickAsync(stoppingToken))
        {
            if (host.Loaded?.Status is not { State: EngineState.Faulted } status) continue;
            Log.Faulted(logger, status.Reason);
            return;
        }
    }
}
