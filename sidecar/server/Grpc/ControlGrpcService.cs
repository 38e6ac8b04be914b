using Grpc.Core;
using Rollout.Engine;
using Rollout.Server.Control;
using Rollout.Server.Hosting;
using Rollout.V1;
using EngineState = Rollout.V1.EngineState;
using PauseMode = Rollout.V1.PauseMode;
using Problem = Rollout.Engine.Problem;

namespace Rollout.Server.Grpc;

/// <summary>rollout.v1.ControlService: status, pause, resume, sleep and wake-up.</summary>
internal sealed class ControlGrpcService(EngineHost host, EngineControl control) : ControlService.ControlServiceBase
{
    public override Task<StatusReply> Status(StatusRequest request, ServerCallContext context)
        => Task.FromResult(host.Loaded is { } engine ? Describe(engine) : new StatusReply { State = EngineState.Loading });

    public override async Task<PauseReply> Pause(PauseRequest request, ServerCallContext context)
    {
        ProblemList problems = [];
        Engine.PauseMode mode = Engine.PauseMode.Keep;
        switch (request.Mode)
        {
            case PauseMode.Abort: mode = Engine.PauseMode.Abort; break;
            case PauseMode.Wait: mode = Engine.PauseMode.Wait; break;
            case PauseMode.Keep: mode = Engine.PauseMode.Keep; break;
            case PauseMode.Unspecified: problems.Add(new Problem("mode", "must be given: ABORT, WAIT or KEEP")); break;
            default: problems.Add(new Problem("mode", $"this server knows no pause mode {(int)request.Mode}")); break;
        }

        TimeSpan lease = TimeSpan.FromMilliseconds(request.LeaseMilliseconds);
        PauseResult result;
        try
        {
            result = await control.PauseAsync(mode, request.Owner, lease, problems, context.CancellationToken);
        }
        catch (InvalidRequestException e)
        {
            throw FieldNames.Pause.Rename(e);
        }

        return new PauseReply { State = ToWire(result.State), AbortedSamples = (uint)result.AbortedSamples };
    }

    public override async Task<ResumeReply> Resume(ResumeRequest request, ServerCallContext context)
        => new() { State = ToWire(await control.ResumeAsync()) };

    public override async Task<SleepReply> Sleep(SleepRequest request, ServerCallContext context)
    {
        (IReadOnlyList<Engine.FreedMemory> freed, EngineStatus status) = await SleepAsync(Tags(request.Tags), request.KeepWeights);
        SleepReply reply = new() { State = ToWire(status.State), Asleep = { ToWire(status.Asleep) } };
        foreach (Engine.FreedMemory memory in freed)
        {
            reply.Freed.Add(new V1.FreedMemory
            {
                Tag = ToWire(memory.Tag).Single(),
                AllocatedBytes = (ulong)memory.AllocatedBytes,
                FreedBytes = (ulong)memory.FreedBytes,
                FreeBytesBefore = (ulong)memory.FreeBytesBefore,
                FreeBytesAfter = (ulong)memory.FreeBytesAfter,
                HostBytes = (ulong)memory.HostBytes,
            });
        }

        return reply;
    }

    public override async Task<WakeUpReply> WakeUp(WakeUpRequest request, ServerCallContext context)
    {
        MemoryTags asleep = await control.WakeUpAsync(Tags(request.Tags));
        return new WakeUpReply { State = ToWire(host.Engine.Status.State), Asleep = { ToWire(asleep) } };
    }

    private async Task<(IReadOnlyList<Engine.FreedMemory> Freed, EngineStatus Status)> SleepAsync(MemoryTags tags, bool keepWeights)
    {
        try
        {
            return await control.SleepAsync(tags, keepWeights);
        }
        catch (InvalidRequestException e)
        {
            throw FieldNames.Sleep.Rename(e);
        }
    }

    /// <summary>No tags mean all.</summary>
    private static MemoryTags Tags(IReadOnlyCollection<MemoryTag> tags)
    {
        ProblemList problems = new(tags.Where(tag => tag is not (MemoryTag.Weights or MemoryTag.KvCache)).Distinct()
            .Select(tag => new Problem("tags", $"this server knows no memory tag {(int)tag}: WEIGHTS, KV_CACHE, or none for all")));
        if (problems.Count > 0) throw new InvalidRequestException(problems);
        return tags.Count == 0 ? MemoryTags.All
            : tags.Aggregate(MemoryTags.None, (all, tag) => all | (tag == MemoryTag.Weights ? MemoryTags.Weights : MemoryTags.KvCache));
    }

    private static IEnumerable<MemoryTag> ToWire(MemoryTags tags)
    {
        if (tags.HasFlag(MemoryTags.Weights)) yield return MemoryTag.Weights;
        if (tags.HasFlag(MemoryTags.KvCache)) yield return MemoryTag.KvCache;
    }

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
            Asleep = { ToWire(status.Asleep) },
            Memory = new V1.MemoryInUse
            {
                Weights = (ulong)status.Memory.Weights,
                Staging = (ulong)status.Memory.Staging,
                KvCache = (ulong)status.Memory.KvCache,
                Graphs = (ulong)status.Memory.Graphs,
                Nccl = (ulong)status.Memory.Nccl,
                Free = (ulong)status.Memory.Free,
            },
        };
    }

    private static EngineState ToWire(Engine.EngineState state) => state switch
    {
        Engine.EngineState.Running => EngineState.Running,
        Engine.EngineState.Pausing => EngineState.Pausing,
        Engine.EngineState.Paused => EngineState.Paused,
        Engine.EngineState.Updating => EngineState.Updating,
        Engine.EngineState.Sleeping => EngineState.Sleeping,
        Engine.EngineState.Poisoned => EngineState.Poisoned,
        _ => EngineState.Faulted,
    };
}
