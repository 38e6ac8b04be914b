using System.Diagnostics;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// The weights in service, the spare set, the update in progress, if there is one, and whether the weights can be trusted. The loop reads
/// <see cref="Current"/> and commits; everything else may be called from any thread.
/// </summary>
internal sealed class ServedWeights(Backend backend, LoadPlan plan, WeightSet loaded, IReadOnlyList<DescribedWeight> described)
    : IDisposable
{
    private readonly Lock _lock = new();
    private WeightSet _current = loaded;
    private WeightSet? _spare; // allocated at the first staged update
    private IReadOnlyList<DescribedWeight> _described = described;
    private ulong _version;
    private volatile ActiveUpdate? _active;
    private volatile ActiveUpdate? _writtenBy;
    private volatile string? _poison;
    private volatile bool _asleep;
    private bool _onHost; // while asleep

    public WeightSet Current => _current;

    /// <summary>The version of the last commit; 0 is the checkpoint as loaded.</summary>
    public ulong Version => Volatile.Read(ref _version);

    /// <summary>Why the weights in service are not those of one version, or null where they are.</summary>
    public string? Poison => _poison;

    /// <summary>The update in progress, or null.</summary>
    public ActiveUpdate? Active => _active;

    /// <summary>The update in place that may write the weights in service, or null. While it is set no step may run.</summary>
    public ActiveUpdate? WrittenBy => _writtenBy;

    /// <summary>Bytes that the set in service and the spare set take now, and the device's graphs that compute with them.</summary>
    public (long Current, long Spare, long Graphs) MemoryInUse()
    {
        lock (_lock)
        {
            (WeightSet current, WeightSet? spare) = (_current, _spare);
            return (_asleep ? 0 : current.Bytes, spare?.Bytes ?? 0, current.RehearsedBytes + (spare?.RehearsedBytes ?? 0));
        }
    }

    public (ulong Version, IReadOnlyList<DescribedWeight> Weights) Describe()
    {
        lock (_lock) return (_version, _described);
    }

    /// <param name="manifest">What is going to be sent.</param>
    /// <param name="alsoWrong">Problems that the caller has found already.</param>
    /// <param name="state">The engine's, for the message of a refusal.</param>
    /// <inheritdoc cref="RolloutEngine.BeginUpdate"/>
    public ActiveUpdate Begin(UpdateManifest manifest, ProblemList alsoWrong, EngineState state)
    {
        lock (_lock)
        {
            if (_active is { Manifest: var other })
                throw new EngineStateException(state, $"'{other.Owner}' is updating the weights to version {other.NewVersion}");
            if (_asleep) throw new EngineStateException(EngineState.Sleeping, "the weights are asleep: wake them before an update");
            ProblemList problems = new(alsoWrong);
            problems.AddRange(UpdatePreflight.Check(manifest, plan, backend.WeightFormat, _version, _poison));
            if (problems.Count > 0) throw new UpdateRejectedException(problems);

            UpdateMode mode = ModeOf(manifest);
            if (mode == UpdateMode.Staged) _spare ??= WeightSet.Allocate(backend, plan);
            return _active = new ActiveUpdate(manifest, mode, mode == UpdateMode.Staged ? _spare! : _current);
        }
    }

    /// <summary>
    /// Staged, before the first byte: marks the weights that the update changes as unknown, and copies those that it does not change from
    /// the set in service to the spare set.
    /// </summary>
    public void PrepareStaging(ActiveUpdate update)
    {
        if (!update.Manifest.IsFull)
        {
            WeightSlot[] behind = [.. update.Destination.NotHolding(_current).Except(WholeWeights(update.Manifest))];
            AllCores.ForEach([.. behind.OrderByDescending(slot => _current[slot].Bytes)], slot =>
            {
                backend.CopyWeight(_current[slot], update.Destination[slot]);
                update.Destination.Holds(slot, _current.VersionOf(slot)!.Value);
            });
        }

        MarkUnknown(update);
    }

    /// <summary>In place, on the loop between two steps: no step may run until the update has ended.</summary>
    /// <exception cref="UpdateFailedException">It has ended already.</exception>
    public void BeginWriting(ActiveUpdate update)
    {
        lock (_lock)
        {
            ThrowUnlessActive(update);
            update.WritingSince = Stopwatch.GetTimestamp();
            _writtenBy = update;
        }
    }

    /// <summary>Called by the loop between two steps: puts the update's weights in service.</summary>
    /// <exception cref="UpdateFailedException">It has ended already.</exception>
    public void Commit(ActiveUpdate update, IReadOnlyList<DescribedWeight> described)
    {
        lock (_lock)
        {
            ThrowUnlessActive(update);
            if (update.Mode == UpdateMode.Staged) (_spare, _current) = (_current, _spare!);
            foreach (LoadPiece piece in PiecesOf(update.Manifest.Tensors)) _current.Holds(piece.Slot, update.Manifest.NewVersion);
            _described = update.Manifest.Partial ? Merge(_described, described) : described;
            Volatile.Write(ref _version, update.Manifest.NewVersion);
            _poison = null; // while poisoned, only a full update can commit
            _active = _writtenBy = null;
        }
    }

    /// <summary>Ends the update without a commit. If bytes were written to the weights in service, they are poisoned.</summary>
    public void End(ActiveUpdate update, UpdateFailure why)
    {
        lock (_lock)
        {
            if (_active != update) return;
            update.EndedFor = why;
            if (update.HasTouchedServedWeights)
            {
                // Only once a byte has been written: until then the served weights are known, and partial updates can build on them.
                MarkUnknown(update);
                _poison = $"the update in place to version {update.Manifest.NewVersion} by '{update.Manifest.Owner}' ended half-way "
                    + $"({why.ToString().ToLowerInvariant()})";
            }

            _active = _writtenBy = null;
        }
    }

    /// <summary>Whether the device has memory of its own, so that weights which sleep can be kept in the host's.</summary>
    public bool CanMoveToHost => _current.CanMoveToHost;

    /// <summary>Frees the memory of both sets. Returns the bytes that were allocated, and those that the host holds instead.</summary>
    /// <param name="keep">Keep the weights in service in the host's memory; otherwise they are discarded.</param>
    /// <param name="state">The engine's, for the message of a refusal.</param>
    /// <exception cref="EngineStateException">An update is in progress.</exception>
    /// <exception cref="OutOfMemoryException">The host does not have enough memory to keep them; nothing has happened.</exception>
    public (long Allocated, long OnHost) Sleep(bool keep, EngineState state)
    {
        lock (_lock)
        {
            if (_active is { } update) throw new EngineStateException(state, $"'{update.Manifest.Owner}' is updating the weights");
            long bytes = _current.Bytes + (_spare?.Bytes ?? 0);
            if (keep) _current.MoveToHost();
            else _current.Discard();
            _spare?.Dispose();
            _spare = null;
            _asleep = true;
            _onHost = keep;
            return (bytes, keep ? _current.Bytes : 0);
        }
    }

    /// <summary>Allocates the memory of one set again, with its content where the host has kept it.</summary>
    /// <exception cref="OutOfMemoryException">The device does not have enough memory; the weights stay asleep.</exception>
    public void Restore()
    {
        lock (_lock)
        {
            _current.Restore();
            if (!_onHost) _poison = "the weights were discarded by sleep";
            _asleep = false;
        }
    }

    public void Dispose()
    {
        // An update may still be writing to one of them; that one is freed when the process ends.
        if (_active is not { Mode: UpdateMode.InPlace }) _current.Dispose();
        if (_active is not { Mode: UpdateMode.Staged }) _spare?.Dispose();
    }

    /// <exception cref="NoRoomException">Staging was requested and there is no memory for it.</exception>
    private UpdateMode ModeOf(UpdateManifest manifest)
    {
        if (manifest.Mode == UpdateMode.InPlace) return UpdateMode.InPlace;
        long available = _spare is null ? backend.AvailableBytes : long.MaxValue;
        // A quarter more, because samples in flight need memory too.
        if (_current.Bytes / 4 * 5 <= available) return UpdateMode.Staged;
        return manifest.Mode == UpdateMode.Auto ? UpdateMode.InPlace
            : throw new NoRoomException($"staging takes {_current.Bytes} bytes, the device has {available} left: update in place");
    }

    private void ThrowUnlessActive(ActiveUpdate update)
    {
        if (_active != update)
            throw new UpdateFailedException(update.EndedFor, "the update was ended before the engine could carry it out");
    }

    private void MarkUnknown(ActiveUpdate update)
    {
        foreach (LoadPiece piece in PiecesOf(update.Manifest.Tensors)) update.Destination.Changing(piece.Slot);
    }

    private IEnumerable<LoadPiece> PiecesOf(IEnumerable<ManifestTensor> tensors) => tensors.SelectMany(tensor => plan[tensor.Name].Pieces);

    private DescribedWeight[] Merge(IReadOnlyList<DescribedWeight> old, IReadOnlyList<DescribedWeight> changed)
    {
        Dictionary<string, DescribedWeight> byName = changed.ToDictionary(weight => weight.Name);
        return [.. old.Select(weight => byName.GetValueOrDefault(weight.Name) ?? Follow(weight))];

        // A tied head that this update does not send has the bytes, and so the digest, of its original.
        DescribedWeight Follow(DescribedWeight weight)
            => plan[weight.Name] is { Tied: true } tied && byName.TryGetValue(tied.TiedTo, out DescribedWeight? original)
                ? original with { Name = weight.Name }
                : weight;
    }

    /// <summary>Weights of which the update sends every element.</summary>
    private IEnumerable<WeightSlot> WholeWeights(UpdateManifest manifest)
        => PiecesOf(manifest.Tensors.Where(tensor => tensor.SparseCount is null))
            .GroupBy(piece => piece.Slot, piece => piece.Elements)
            .Where(sent => sent.Sum() == _current[sent.Key].Outputs * (long)_current[sent.Key].Inputs)
            .Select(sent => sent.Key);
}
