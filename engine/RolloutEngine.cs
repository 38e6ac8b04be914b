using System.Collections.Concurrent;
using System.Diagnostics;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// The engine: one thread, the loop, owns sequences, KV blocks, weights and the device. Other threads post commands to an inbox, which the
/// loop empties between two steps, and read samples from their group.
/// <code>
///   callers --commands--> [ inbox ] --> loop: apply commands -> Next -> Forward -> Sample -> CollectResults --> groups --> readers
/// </code>
/// Where the device runs asynchronously, the next step is planned and queued before the results of the one before are collected, so that
/// the device does not wait for the host. Commands and updates are applied while no step is in flight.
/// </summary>
public sealed partial class RolloutEngine : IAsyncDisposable
{
    private const string Stopped = "the engine was stopped";

    private readonly EngineOptions _options;
    private readonly RequestValidator _validator;
    private readonly Transformer _transformer;
    private readonly Workspace _workspace;
    private readonly KvCache _kv;
    private readonly KvBlocks _blocks;
    private readonly Scheduler _scheduler;
    private readonly ScheduledStep[] _steps; // used alternately
    private ScheduledStep? _inFlight;
    private readonly Pause _pause = new();

    private readonly ConcurrentQueue<Action> _inbox = new();
    private readonly SemaphoreSlim _wake = new(0);
    private readonly ConcurrentDictionary<string, Group> _groups = new();
    private readonly Thread _thread;
    private int _unfinishedSamples;
    private long _stepCount;
    private long _checkedAfter = -1; // the step count at which the KV blocks were checked last
    private volatile bool _stopping;
    private volatile string? _fault;

    private readonly ServedWeights _weights;
    private BoundaryAction? _boundaryAction; // of an update, to run between two steps; only the loop uses it
    private volatile MemoryTags _asleep;

    private RolloutEngine(string name, ModelSpec model, Transformer transformer, Tokenizer? tokenizer, Backend backend,
        EngineOptions options, WeightSet weights, IReadOnlyList<ServedTensor> tensors)
    {
        ModelName = name;
        Model = model;
        Tokenizer = tokenizer;
        Backend = backend;
        _options = options;
        _weights = new ServedWeights(backend, transformer.Weights, weights, tensors);

        ArgumentOutOfRangeException.ThrowIfNegative(options.MaxContext);
        ArgumentOutOfRangeException.ThrowIfLessThan(options.MaxSequences, 1);
        ArgumentOutOfRangeException.ThrowIfNegative(options.MaxBatchTokens);
        ArgumentOutOfRangeException.ThrowIfNegative(options.KvCacheBytes);
        if (options.KvCacheFraction is not (>= 0 and <= 1) || (options.KvCacheFraction > 0 && options.KvCacheBytes > 0))
        {
            throw new ArgumentOutOfRangeException(nameof(options), options.KvCacheFraction,
                "A part of the free memory is from 0 to 1, and given instead of bytes.");
        }

        int stepTokens = options.MaxBatchTokens == 0 ? backend.StepTokens : options.MaxBatchTokens;
        int context = options.MaxContext == 0 ? model.MaxPositions : Math.Min(options.MaxContext, model.MaxPositions);
        int blocks = KvBlockCount(transformer.Kv, backend, options, context);
        MaxContext = Math.Min(context, blocks * KvCache.BlockTokens);
        _validator = new RequestValidator(model.VocabSize, MaxContext, tokenizer is not null);
        _kv = backend.AllocateKvCache(blocks, transformer.Kv);
        _transformer = transformer;
        _workspace = transformer.AllocateWorkspace(backend, stepTokens, MaxContext);
        _blocks = new KvBlocks(blocks);
        Metrics = new EngineMetrics(name, () => Version);
        _scheduler = new Scheduler(_blocks, options.MaxSequences, stepTokens, SequenceEnded, GroupEnded);
        int queries = stepTokens + options.MaxSequences;
        _steps = [.. Enumerable.Range(0, 2).Select(_ => new ScheduledStep(new StepLayout(stepTokens, options.MaxSequences,
            KvBlocks.CountFor(MaxContext), queries, queries * Math.Min(RequestValidator.MaxTop, model.VocabSize), maxBiases: 1024)))];
        RunOneToken();
        Rehearse(weights);
        _thread = new Thread(Loop) { Name = "rollout loop", IsBackground = true };
        _thread.Start();
    }

    public string ModelName { get; }

    public ModelSpec Model { get; }

    public Tokenizer? Tokenizer { get; }

    public Backend Backend { get; }

    /// <summary>Longest sample, prompt included: the model's limit, the operator's, or what the KV cache holds.</summary>
    public int MaxContext { get; }

    /// <summary>Weights version being served. 0 is the checkpoint as loaded.</summary>
    public ulong Version => _weights.Version;

    internal EngineMetrics Metrics { get; }

    /// <summary>Returns without waiting for the loop or the device.</summary>
    public EngineStatus Status => new()
    {
        State = State,
        Reason = Reason,
        Version = Version,
        Running = _scheduler.Running,
        Waiting = _scheduler.Waiting,
        KvBlocksTotal = _blocks.Total,
        KvBlocksUsed = _blocks.Used,
        KvBlocksCached = _blocks.Cached,
        Steps = Volatile.Read(ref _stepCount),
        GeneratedTokens = _scheduler.GeneratedTokens,
        PrefilledTokens = _scheduler.PrefilledTokens,
        PrefixHitTokens = _scheduler.PrefixHitTokens,
        Preemptions = _scheduler.Preemptions,
        UpdateOwner = _weights.Active?.Manifest.Owner,
        Asleep = _asleep,
        Memory = MemoryInUse(),
    };

    private MemoryInUse MemoryInUse()
    {
        (long weights, long staging, long graphs) = _weights.MemoryInUse();
        return new MemoryInUse(
            weights, staging, _asleep.HasFlag(MemoryTags.KvCache) ? 0 : _kv.Bytes, graphs, Backend.Peers?.RanksBytes ?? 0,
            Backend.AvailableBytes);
    }

    private EngineState State
        => _fault is not null ? EngineState.Faulted
            : _asleep != MemoryTags.None ? EngineState.Sleeping
            : _weights.Poison is not null ? EngineState.Poisoned
            : _weights.WrittenBy is not null ? EngineState.Updating
            : _pause.State;

    private string Reason // in the order of State; poison is also reported during sleep, since waking does not cure it
        => _fault
            ?? (_asleep == MemoryTags.None ? _weights.Poison ?? _weights.WrittenBy?.Manifest.Owner ?? _pause.Owner
                : _weights.Poison is { } poison ? $"asleep: {_asleep}; poisoned: {poison}"
                : $"asleep: {_asleep}");

    /// <summary>Loads a Hugging Face folder and starts the loop. The engine owns <paramref name="backend"/> from then on.</summary>
    /// <param name="modelFolder">config.json, *.safetensors and, for text, tokenizer.json.</param>
    /// <param name="backend">The device.</param>
    /// <param name="options">Limits.</param>
    /// <param name="tokenizer">Replaces the folder's tokenizer.</param>
    /// <param name="progress">Fraction of the weights loaded.</param>
    /// <exception cref="InvalidModelException">The folder cannot be served; lists every problem.</exception>
    public static RolloutEngine Load(string modelFolder, Backend backend, EngineOptions options, Tokenizer? tokenizer = null,
        IProgress<double>? progress = null)
    {
        ModelSpec model = ModelSpec.Load(modelFolder);
        using Checkpoint checkpoint = Checkpoint.Open(modelFolder);
        if (tokenizer is null && File.Exists(Path.Combine(modelFolder, "tokenizer.json"))) tokenizer = Tokenizer.Load(modelFolder);
        Transformer transformer = new(model);
        WeightSet weights = WeightSet.Allocate(backend, transformer.Weights);
        IReadOnlyList<ServedTensor> tensors = ModelLoader.Load(checkpoint, transformer.Weights, backend, weights, progress);
        string name = Path.GetFileName(Path.TrimEndingDirectorySeparator(Path.GetFullPath(modelFolder)));
        return new RolloutEngine(name, model, transformer, tokenizer, backend, options, weights, tensors);
    }

    /// <summary>As <see cref="Load"/>, with weights that are on the device already.</summary>
    internal static RolloutEngine Start(string name, ModelSpec model, Backend backend, EngineOptions options, WeightSet weights)
        => new(name, model, new Transformer(model), tokenizer: null, backend, options, weights, tensors: []);

    // ---- The loop.

    private void Loop()
    {
        try
        {
            while (!_stopping)
            {
                ScheduledStep? queued = null;
                bool betweenSteps = _inFlight is null;
                if (betweenSteps)
                {
                    ApplyCommands();
                    TryRunBoundaryAction();
                }

                if (betweenSteps || (Backend.StepsInFlight > 1 && !IsInterrupted)) queued = TryQueueStep();

                (ScheduledStep? earlier, _inFlight) = (_inFlight, queued);
                if (earlier is not null) CollectResults(earlier); // while the device runs the step just queued
                else if (queued is null) WaitForWork();
            }
        }
        catch (Exception e)
        {
            Fault(e);
        }

        EndAll(Stopped);
    }

    /// <summary>Whether the loop has work that must wait until no step is in flight.</summary>
    private bool IsInterrupted => !_inbox.IsEmpty || _boundaryAction is not null || _pause.State != EngineState.Running;

    /// <summary>Plans the next step and hands it to the device. Null when no step may run or there is nothing to compute.</summary>
    private ScheduledStep? TryQueueStep()
    {
        ScheduledStep step = _inFlight == _steps[0] ? _steps[1] : _steps[0];
        bool admitNew = !_pause.HoldsNewGroups && _boundaryAction is null;
        if (!MayStep() || !_scheduler.Next(step, admitNew)) return null;
        _transformer.Forward(step.Layout, _weights.Current, _kv, _workspace);
        foreach (BlockCopy copy in step.Copies) Backend.CopyBlock(_kv, copy.From, copy.To);
        _transformer.Sample(step.Layout, _weights.Current, _workspace);
        return step;
    }

    /// <summary>Whether a step may run now. Ends a pause whose lease is over, and all groups where the weights are poisoned.</summary>
    private bool MayStep()
    {
        bool paused = _pause.Stops(_scheduler);
        if (_weights.Poison is not null)
            foreach (Group group in _groups.Values) _scheduler.End(group, FinishReason.Abort);
        return !paused && _weights.WrittenBy is null && _asleep == MemoryTags.None && _weights.Poison is null;
    }

    /// <summary>Waits for a step's results and passes them to the groups.</summary>
    private void CollectResults(ScheduledStep step)
    {
        Backend.FinishStep(step.Layout);
        _scheduler.CollectResults(step);
        Volatile.Write(ref _stepCount, _stepCount + 1);
    }

    private void WaitForWork()
    {
        _scheduler.WakeStreams();
        if (_scheduler.IsEmpty && _checkedAfter != _stepCount)
        {
            _blocks.CheckInvariant(idle: true);
            _checkedAfter = _stepCount; // every command wakes the loop, and the check walks all blocks
        }

        _wake.Wait(_pause.UntilLeaseEnds());
    }

    private void ApplyCommands()
    {
        while (_inbox.TryDequeue(out Action? command)) command();
    }

    /// <summary>Ends all groups and from then on only answers commands, so that callers get the error instead of waiting.</summary>
    private void Fault(Exception e)
    {
        _fault = $"{e.GetType().Name}: {e.Message}";
        EndAll(_fault);
        while (!_stopping)
        {
            ApplyCommands();
            _wake.Wait();
        }
    }

    private void EndAll(string error)
    {
        ApplyCommands();
        _boundaryAction?.Done.TrySetException(new UpdateFailedException(UpdateFailure.Engine, $"{error}; the update was not committed"));
        _boundaryAction = null;
        foreach (Group group in _groups.Values) _scheduler.End(group, FinishReason.Error, error);
    }

    private void SequenceEnded(Sequence sequence) => Metrics.CountTokens(sequence.Versions(0, sequence.Sampled), _scheduler.Version);

    private void GroupEnded(Group group)
    {
        _groups.TryRemove(group.Request.Id, out _);
        Interlocked.Add(ref _unfinishedSamples, -group.Sequences.Count);
    }

    // ---- Commands, from any thread.

    /// <summary>Checks the request and queues it. Its samples are read from the group.</summary>
    /// <exception cref="InvalidRequestException">Lists everything wrong with it.</exception>
    /// <exception cref="NoRoomException">Too many samples are waiting already.</exception>
    /// <exception cref="EngineStateException">The engine sleeps or is poisoned.</exception>
    /// <exception cref="EngineFaultedException">The engine has failed.</exception>
    public Group Submit(GroupRequest request)
    {
        ThrowIfDown();
        if (Refusal() is { } refusal) throw refusal;
        ProblemList problems = _validator.Validate(request);
        if (_groups.ContainsKey(request.Id)) problems.Add(new(nameof(request.Id), $"'{request.Id}' is in flight already"));
        if (problems.Count > 0) throw new InvalidRequestException(problems);

        int limit = _options.MaxSequences + _options.MaxWaiting;
        if (Interlocked.Add(ref _unfinishedSamples, request.N) > limit)
        {
            Interlocked.Add(ref _unfinishedSamples, -request.N);
            throw new NoRoomException($"{limit} samples are in flight already; {request.N} more do not fit");
        }

        int maxTokens = request.MaxTokens ?? MaxContext - request.Prompt.Length;
        Sequence[] sequences = new Sequence[request.N];
        for (int i = 0; i < sequences.Length; i++)
        {
            sequences[i] = new Sequence(i, request.Prompt, maxTokens, request.TopLogProbs)
            {
                StopStrings = request.StopStrings.Count == 0 ? null : new StopStringMatcher(request.StopStrings, Tokenizer!),
            };
        }

        Group group = new(request, sequences, [.. request.StopTokenIds, .. request.IgnoreEos ? [] : Model.EosTokenIds]);
        if (!_groups.TryAdd(request.Id, group))
        {
            Interlocked.Add(ref _unfinishedSamples, -request.N);
            throw new InvalidRequestException(new([new(nameof(request.Id), $"'{request.Id}' is in flight already")]));
        }

        Post(() =>
        {
            if (group.Completed.IsCompleted) return; // aborted before it was queued, which its registered id allows
            if (_fault is not null || _stopping) _scheduler.End(group, FinishReason.Error, _fault ?? Stopped);
            else if (Refusal() is not null) _scheduler.End(group, FinishReason.Abort); // went to sleep or was poisoned after Submit's check
            else _scheduler.Submit(group);
        });
        return group;
    }

    /// <summary>Ends a group; its samples keep their tokens. Returns the number of samples that had not ended.</summary>
    public Task<int> AbortAsync(Group group) => OnLoop(() => _scheduler.End(group, FinishReason.Abort));

    /// <summary>Ends groups by id, or all of them.</summary>
    public Task<AbortCounts> AbortAsync(IReadOnlyCollection<string>? ids) => OnLoop(() =>
    {
        List<string> unknown = [];
        int groups = 0;
        int samples = 0;
        foreach (string id in ids ?? [.. _groups.Keys])
        {
            if (!_groups.TryGetValue(id, out Group? group))
            {
                unknown.Add(id);
                continue;
            }

            samples += _scheduler.End(group, FinishReason.Abort);
            groups++;
        }

        return new AbortCounts(groups, samples, unknown);
    });

    /// <summary>Completes once the pause is in force. A pause is a lease: it expires, and pausing again renews it.</summary>
    public async Task<PauseResult> PauseAsync(PauseMode mode, string owner, TimeSpan lease, CancellationToken cancellation = default)
    {
        (Task inForce, int aborted) = await OnLoop(() =>
        {
            ThrowIfDown();
            int samples = 0;
            if (mode == PauseMode.Abort)
                foreach (Group group in _groups.Values) samples += _scheduler.End(group, FinishReason.Abort);
            return (_pause.Begin(mode, owner, lease), samples);
        }).ConfigureAwait(false);
        await inForce.WaitAsync(cancellation).ConfigureAwait(false);
        return new PauseResult(Status.State, aborted);
    }

    /// <summary>Ends a pause, if there is one.</summary>
    public Task<EngineState> ResumeAsync() => OnLoop(() =>
    {
        ThrowIfDown();
        _pause.End();
        return Status.State;
    });

    /// <summary>Ends all groups, stops the loop and frees the device's memory.</summary>
    public async ValueTask DisposeAsync()
    {
        if (_stopping) return;
        _stopping = true;
        _wake.Release();
        await Task.Run(_thread.Join).ConfigureAwait(false);
        ApplyCommands(); // posted after the loop last emptied the inbox
        _workspace.Dispose();
        _kv.Dispose();
        _weights.Dispose();
        Metrics.Dispose();
        Backend.Dispose();
    }

    private static int KvBlockCount(IReadOnlyList<KvLayout> layers, Backend backend, EngineOptions options, int context)
    {
        long blockBytes = layers.Sum(layer => layer.BlockElements) * backend.KvElementBytes;
        long stated = options.KvCacheFraction > 0 ? (long)(options.KvCacheFraction * backend.AvailableBytes) : options.KvCacheBytes;
        long wanted = (long)options.MaxSequences * KvBlocks.CountFor(context);
        long affordable = Math.Max(1, (stated > 0 ? stated : backend.KvCacheBudget) / blockBytes);
        return (int)Math.Min(affordable, stated > 0 ? int.MaxValue / KvCache.BlockTokens : wanted);
    }

    private void Post(Action command)
    {
        _inbox.Enqueue(command);
        _wake.Release();
    }

    private Task<T> OnLoop<T>(Func<T> command)
    {
        TaskCompletionSource<T> done = new(TaskCreationOptions.RunContinuationsAsynchronously);
        Post(() =>
        {
            try
            {
                done.SetResult(command());
            }
            catch (Exception e)
            {
                done.SetException(e);
            }
        });
        return done.Task;
    }

    /// <summary>Why no request can be accepted now, or null.</summary>
    private EngineStateException? Refusal()
        => State switch
        {
            EngineState.Sleeping => new EngineStateException(EngineState.Sleeping, $"the engine sleeps ({_asleep}): wake it up first"),
            EngineState.Poisoned => new EngineStateException(EngineState.Poisoned,
                $"the engine is poisoned, {_weights.Poison}: only a full update makes it serve again"),
            _ => null,
        };

    private void ThrowIfDown()
    {
        if (_fault is { } fault) throw new EngineFaultedException(fault);
        ObjectDisposedException.ThrowIf(_stopping, this);
    }
}

/// <summary>Groups and samples that an abort ended, and the ids that were not in flight.</summary>
public sealed record AbortCounts(int Groups, int Sequences, IReadOnlyList<string> Unknown);

public sealed record PauseResult(EngineState State, int AbortedSamples);
