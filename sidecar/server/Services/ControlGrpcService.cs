using Grpc.Core;
using Rollout.Engine;
using Rollout.Server.Hosting;
using Rollout.V1;
using EngineState = Rollout.V1.EngineState;
using PauseMode = Rollout.V1.PauseMode;
using Problem = Rollout.Engine.Problem;

namespace Rollout.Server.Services;

/// <summary>rollout.v1.ControlService: the life of the engine.</summary>
internal sealed class ControlGrpcService(EngineHost host, ILogger<ControlGrpcService> logger) : ControlService.ControlServiceBase
{
    public override Task<StatusReply> Status(StatusRequest request, ServerCallContext context)
        => Task.FromResult(host.Loaded is { } engine ? Describe(engine) : new StatusReply { State = EngineState.Loading });

    public override async Task<PauseReply> Pause(PauseRequest request, ServerCallContext context)
    {
        List<Problem> problems = [];
        Engine.PauseMode mode = Engine.PauseMode.Keep;
        switch (request.Mode)
        {
            case PauseMode.Abort: mode = Engine.PauseMode.Abort; break;
            case PauseMode.Wait: mode = Engine.PauseMode.Wait; break;
            case PauseMode.Keep: mode = Engine.PauseMode.Keep; break;
            case PauseMode.Unspecified: problems.Add(new Problem("mode", "must be given: ABORT, WAIT or KEEP")); break;
            default: problems.Add(new Problem("mode", $"this server knows no pause mode {(int)request.Mode}")); break;
        }

        if (request.LeaseMilliseconds == 0)
            problems.Add(new Problem("lease_milliseconds", "must be given: the pause ends by itself after it"));
        if (request.Owner.Length > MaxOwner)
            problems.Add(new Problem("owner", $"at most {MaxOwner} characters, has {request.Owner.Length}"));
        if (problems.Count > 0) throw new InvalidRequestException(problems);

        TimeSpan lease = TimeSpan.FromMilliseconds(request.LeaseMilliseconds);
        PauseResult result = await host.Engine.PauseAsync(mode, request.Owner, lease, context.CancellationToken);
        Log.Paused(logger, mode.ToString(), request.Owner, request.LeaseMilliseconds, result.AbortedSamples);
        return new PauseReply { State = ToWire(result.State), AbortedSamples = (uint)result.AbortedSamples };
    }

    public override async Task<ResumeReply> Resume(ResumeRequest request, ServerCallContext context)
    {
        Engine.EngineState state = await host.Engine.ResumeAsync();
        Log.Resumed(logger);
        return new ResumeReply { State = ToWire(state) };
    }

    private const int MaxOwner = 256;

    private static StatusReply Describe(RolloutEngine engine)
    {
        EngineStatus status = engine.Status;
        return new StatusReply
        {
            State = ToWire(status.State),
            Reason = status.Reason,
            Version = status.Version,
            Model = engine.ModelName,
            Backend = engine.Backend.Name,
            Running = (uint)status.Running,
            Waiting = (uint)status.Waiting,
            KvBlocksTotal = (ulong)status.KvBlocksTotal,
            KvBlocksUsed = (ulong)status.KvBlocksUsed,
            KvBlocksCached = (ulong)status.KvBlocksCached,
            Steps = (ulong)status.Steps,
            GeneratedTokens = (ulong)status.GeneratedTokens,
            PrefilledTokens = (ulong)status.PrefilledTokens,
            PrefixHitTokens = (ulong)status.PrefixHitTokens,
            Preemptions = (ulong)status.Preemptions,
            Updating = status.UpdateOwner is not null,
            UpdateOwner = status.UpdateOwner ?? "",
            VocabSize = (uint)engine.Model.VocabSize,
            MaxContext = (uint)engine.MaxContext,
        };
    }

    private static EngineState ToWire(Engine.EngineState state) => state switch
    {
        Engine.EngineState.Running => EngineState.Running,
        Engine.EngineState.Pausing => EngineState.Pausing,
        Engine.EngineState.Paused => EngineState.Paused,
        _ => EngineState.Faulted,
    };
}
