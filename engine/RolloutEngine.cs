using System.Collections.Concurrent;
using System.Diagnostics;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// The engine: one thread owns sequences, KV blocks, weights and the device. Everybody else hands it commands through an inbox, which it
/// empties between two steps, and reads samples from their group.
/// <code>
///   callers --commands--> [ inbox ] --> loop: apply commands -> Next -> Forward -> Sample -> Complete --> groups --> readers
/// </code>
/// Where the device works beside the host, Complete is of the step before, and so is Next ahead of its answers: the host's part of a step costs no time.
/// Commands and updates still find no step under way.
/// </summary>
public sealed partial class RolloutEngine : IAsyncDisposable
{
    private const string Stopped = "the engine was stopped";

    private readonly EngineOptions _options;
    private readonly RequestValidator _validator;
    private readonly Transformer _transformer;
    private readonly KvCache _kv;
    private readonly KvBlocks _blocks;
    private readonly Scheduler _scheduler;
    private readonly ScheduledStep[] _plans; // in turn
    private ScheduledStep _next;
    private ScheduledStep? _underWay;
    private readonly Pause _pause = new();

    private readonly ConcurrentQueue<Action> _inbox = new();
    private readonly SemaphoreSlim _wake = new(0);
    private readonly ConcurrentDictionary<string, Group> _groups = new();
    private readonly Thread _thread;
    private int _unfinishedSamples;
    private long _steps;
    private volatile bool _stopping;
    private volatile string? _fault;

    private readonly ServedWeights _weights;
    private Moment? _moment;                // what an update wants done between two steps; the loop's
    private volatile WeightUpdate? _standsFor; // the update in place for which no step runs
    private volatile MemoryTags _asleep;

    private RolloutEngine(string name, ModelSpec model, LoadPlan plan, Tokenizer? tokenizer, IBackend backend, EngineOptions options,
        WeightSet weights, IReadOnlyList<DescribedWeight> described)
    {
        ModelName = name;
        Model = model;
        Tokenizer = tokenizer;
        Backend = backend;
        _options = options;
        _weights = new ServedWeights(backend, plan, model.Layers, weights, described);

        ArgumentOutOfRangeException.ThrowIfNegative(options.MaxContext);
        ArgumentOutOfRangeException.ThrowIfLessThan(options.MaxSequences, 1);
        ArgumentOutOfRangeException.ThrowIfNegative(options.MaxBatchTokens);
        ArgumentOutOfRangeException.ThrowIfNegative(options.KvCacheBytes);
        if (options.KvCacheFraction is not (>= 0 and <= 1) || (options.KvCacheFraction > 0 && options.KvCacheBytes > 0))
            throw new ArgumentOutOfRangeException(nameof(options), options.KvCacheFraction, "A part of the free memory is from 0 to 1, and given instead of bytes.");
        int stepTokens = options.MaxBatchTokens == 0 ? backend.StepTokens : options.MaxBatchTokens;
        int context = options.MaxContext == 0 ? model.MaxPositions : Math.Min(options.MaxContext, model.MaxPositions);
        int blocks = KvBlockCount(model, backend, options, context);
        MaxContext = Math.Min(context, blocks * KvCache.BlockTokens);
        _validator = new RequestValidator(model.VocabSize, MaxContext, tokenizer is not null);
        _kv = backend.AllocateKvCache(model.Layers, blocks, model.KvHeads, model.HeadDim);
        _transformer = new Transformer(model, backend, stepTokens, MaxContext);
        _blocks = new KvBlocks(blocks);
        _scheduler = new Scheduler(_blocks, options.MaxSequences, stepTokens, GroupEnded);
        int queries = stepTokens + options.MaxSequences;
        _plans = [.. Enumerable.Range(0, 2).Select(_ => new ScheduledStep(new StepLayout(stepTokens, options.MaxSequences,
            KvBlocks.CountFor(MaxContext), queries, queries * Math.Min(RequestValidator.MaxTop, model.VocabSize), maxBiases: 1024)))];
        _next = _plans[0];
        RunOneToken();
        Rehearse(weights);
        Metrics = new EngineMetrics(name, () => Version, _scheduler);
        _thread = new Thread(Loop) { Name = "rollout loop", IsBackground = true };
        _thread.Start();
    }

    public string ModelName { get; }

    public ModelSpec Model { get; }

    public Tokenizer? Tokenizer { get; }

    public IBackend Backend { get; }

    /// <summary>Longest sample, prompt included: the model's limit, the operator's, or what the KV cache holds.</summary>
    public int MaxContext { get; }

    /// <summary>Weights version being served. 0 is the checkpoint as loaded.</summary>
    public ulong Version => _weights.Version;

    internal EngineMetrics Metrics { get; }

    /// <summary>Never waits for the loop or the device.</summary>
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
        Steps = Volatile.Read(ref _steps),
        GeneratedTokens = _scheduler.GeneratedTokens,
        PrefilledTokens = _scheduler.PrefilledTokens,
        PrefixHitTokens = _scheduler.PrefixHitTokens,
        Preemptions = _scheduler.Preemptions,
        UpdateOwner = _weights.Updating?.Manifest.Owner,
        Asleep = _asleep,
    };

    private EngineState State
        => _fault is not null ? EngineState.Faulted
            : _asleep != MemoryTags.None ? EngineState.Sleeping
            : _weights.Poison is not null ? EngineState.Poisoned
            : _standsFor is not null ? EngineState.Updating
            : _pause.State;

    private string Reason // of the state, so in the same order; poison shows also under sleep, since waking will not be enough
        => _fault
            ?? (_asleep == MemoryTags.None ? _weights.Poison ?? _standsFor?.Manifest.Owner ?? _pause.Owner
                : _weights.Poison is { } poison ? $"asleep: {_asleep}; poisoned: {poison}"
                : $"asleep: {_asleep}");

    /// <summary>Loads a Hugging Face folder and starts the loop. The engine owns <paramref name="backend"/> from then on.</summary>
    /// <param name="modelFolder">config.json, *.safetensors and, for text, tokenizer.json.</param>
    /// <param name="backend">The device.</param>
    /// <param name="options">Limits.</param>
    /// <param name="tokenizer">Used instead of the folder's.</param>
    /// <param name="progress">Fraction of the weights loaded.</param>
    /// <exception cref="InvalidModelException">The folder cannot be served; lists every problem.</exception>
    public static RolloutEngine Load(string modelFolder, IBackend backend, EngineOptions options, Tokenizer? tokenizer = null,
        IProgress<double>? progress = null)
    {
        ModelSpec model = ModelSpec.Load(modelFolder);
        using Checkpoint checkpoint = Checkpoint.Open(modelFolder);
        if (tokenizer is null && File.Exists(Path.Combine(modelFolder, "tokenizer.json"))) tokenizer = Tokenizer.Load(modelFolder);
        LoadPlan plan = LoadPlan.Compile(model);
        WeightSet weights = WeightSet.Allocate(backend, plan, model.Layers);
        IReadOnlyList<DescribedWeight> described = ModelLoader.Load(checkpoint, plan, backend, weights, progress);
        string name = Path.GetFileName(Path.TrimEndingDirectorySeparator(Path.GetFullPath(modelFolder)));
        return new RolloutEngine(name, model, plan, tokenizer, backend, options, weights, described);
    }

    /// <summary>As <see cref="Load"/>, of weights that are on the device already and were in no file.</summary>
    internal static RolloutEngine Start(string name, ModelSpec model, IBackend backend, EngineOptions options, WeightSet weights)
        => new(name, model, LoadPlan.Compile(model), tokenizer: null, backend, options, weights, described: []);

    // ---- The loop.

    private void Loop()
    {
        long checkedAfter = -1;
        try
        {
            while (!_stopping)
            {
                if (!_inbox.IsEmpty || _moment is not null || _pause.State != EngineState.Running)
                {
                    Land();
                    ApplyCommands();
                    if (_moment is not null) TryTake(_moment);
                }

                if (MustStand() || !_scheduler.Next(_next, admitNew: !_pause.HoldsNewGroups && _moment is null))
                {
                    if (Land()) continue;
                    _scheduler.RaiseStreams();
                    if (_scheduler.IsEmpty && checkedAfter != _steps)
                    {
                        _blocks.CheckInvariant(idle: true);
                        checkedAfter = _steps; // every command wakes the loop, and the check walks all blocks
                    }

                    _wake.Wait(_pause.UntilLeaseEnds());
                    continue;
                }

                _transformer.Forward(_next.Layout, _weights.Current, _kv);
                foreach (BlockCopy copy in _next.Copies) Backend.CopyBlock(_kv, copy.From, copy.To);
                _transformer.Sample(_next.Layout, _weights.Current);

                Land(); // the step before, while the device works on this one
                (_underWay, _next) = (_next, _next == _plans[0] ? _plans[1] : _plans[0]);
                if (Backend.StepsUnderWay == 1) Land();
            }
        }
        catch (Exception e)
        {
            Fault(e);
        }

        EndAll(Stopped);
    }

    /// <summary>Takes in the answers of the step under way, waiting for them. False when there is none.</summary>
    private bool Land()
    {
        if (_underWay is not { } step) return false;
        _underWay = null;
        Backend.FinishStep(step.Layout);
        _scheduler.Complete(step);
        Volatile.Write(ref _steps, _steps + 1);
        return true;
    }

    /// <summary>Whether no step may run now. Ends a pause whose lease is over, and samples that poisoned weights would go on.</summary>
    private bool MustStand()
    {
        bool paused = _pause.Stops(_scheduler);
        if (_weights.Poison is not null)
            foreach (Group group in _groups.Values) _scheduler.End(group, FinishReason.Abort);
        return paused || _standsFor is not null || _asleep != MemoryTags.None || _weights.Poison is not null;
    }

    private void ApplyCommands()
    {
        while (_inbox.TryDequeue(out Action? command)) command();
    }

    /// <summary>Serves nothing any more, but goes on answering: callers learn why instead of waiting.</summary>
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
        _moment?.Done.TrySetException(new UpdateFailedException(UpdateFailure.Engine, $"{error}; the update was not committed"));
        _moment = null;
        foreach (Group group in _groups.Values) _scheduler.End(group, FinishReason.Error, error);
    }

    private void GroupEnded(Group group)
    {
        _groups.TryRemove(group.Request.Id, out _);
        Interlocked.Add(ref _unfinishedSamples, -group.Samples.Count);
    }

    // ---- Commands, from any thread.

    /// <summary>Checks the request and queues it. Its samples come through the group.</summary>
    /// <exception cref="InvalidRequestException">Lists everything wrong with it.</exception>
    /// <exception cref="NoRoomException">Too many samples wait already.</exception>
    /// <exception cref="EngineStateException">The engine sleeps or is poisoned.</exception>
    /// <exception cref="EngineFaultedException">The engine serves nothing any more.</exception>
    public Group Submit(GroupRequest request)
    {
        ThrowIfDown();
        if (Refusal() is { } refusal) throw refusal;
        List<Problem> problems = [.. _validator.Validate(request)];
        if (_groups.ContainsKey(request.Id)) problems.Add(new(nameof(request.Id), $"'{request.Id}' is in flight already"));
        if (problems.Count > 0) throw new InvalidRequestException(problems);

        int limit = _options.MaxSequences + _options.MaxWaiting;
        if (Interlocked.Add(ref _unfinishedSamples, request.N) > limit)
        {
            Interlocked.Add(ref _unfinishedSamples, -request.N);
            throw new NoRoomException($"{limit} samples are in flight already; {request.N} more do not fit");
        }

        int maxTokens = request.MaxTokens ?? MaxContext - request.Prompt.Length;
        Sequence[] samples = new Sequence[request.N];
        for (int i = 0; i < samples.Length; i++)
        {
            samples[i] = new Sequence(i, request.Prompt, maxTokens, request.TopLogProbs)
            {
                StopStrings = request.StopStrings.Count == 0 ? null : new StopStringMatcher(request.StopStrings, Tokenizer!),
            };
        }

        Group group = new(request, samples, [.. request.StopTokenIds, .. request.IgnoreEos ? [] : Model.EosTokenIds]);
        if (!_groups.TryAdd(request.Id, group))
        {
            Interlocked.Add(ref _unfinishedSamples, -request.N);
            throw new InvalidRequestException([new(nameof(request.Id), $"'{request.Id}' is in flight already")]);
        }

        Post(() =>
        {
            if (group.Completed.IsCompleted) return; // on its way: it could be aborted as soon as its id was known
            if (_fault is not null || _stopping) _scheduler.End(group, FinishReason.Error, _fault ?? Stopped);
            else if (Refusal() is not null) _scheduler.End(group, FinishReason.Abort); // it fell asleep or ill in between
            else _scheduler.Submit(group);
        });
        return group;
    }

    /// <summary>Ends a group; its samples keep what they have. Returns how many samples were still going.</summary>
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

    /// <summary>Completes once the pause is in force. A pause is a lease: it ends by itself, and pausing again renews it.</summary>
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
        ApplyCommands(); // whoever asked after the loop's last look
        _transformer.Dispose();
        _kv.Dispose();
        _weights.Dispose();
        Metrics.Dispose();
        Backend.Dispose();
    }

    private static int KvBlockCount(ModelSpec model, IBackend backend, EngineOptions options, int context)
    {
        long blockBytes = 2L * model.Layers * model.KvHeads * model.HeadDim * KvCache.BlockTokens * backend.KvElementBytes;
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

    /// <summary>Why no request can be taken now, or null.</summary>
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

/// <summary>What an abort ended, and the ids that were not in flight.</summary>
public sealed record AbortCounts(int Groups, int Samples, IReadOnlyList<string> Unknown);

public sealed record PauseResult(EngineState State, int AbortedSamples);
