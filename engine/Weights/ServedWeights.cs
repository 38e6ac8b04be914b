using System.Diagnostics;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// The weights in service, the spare set, the update in progress, if there is one, and whether the weights can be trusted. The loop reads
/// <see cref="Current"/> and commits; everything else may be called from any thread.
/// </summary>
internal sealed class ServedWeights(Backend backend, LoadPlan plan, WeightSet loaded, IReadOnlyList<ServedTensor> tensors)
    : IDisposable
{
    private const int MostRehashes = 3; // where an update comes in between

    private readonly Lock _lock = new();
    private readonly Lock _rehashing = new(); // one at a time; who waits finds the work done
    private readonly Lock _memory = new();    // held to free memory, and while a piece of the weights is read
    private WeightSet _current = loaded;
    private WeightSet? _spare; // allocated at the first staged update
    private IReadOnlyList<ServedTensor> _tensors = tensors;
    private long _changes; // how often what Current refers to has changed, or an update in place was allowed to change it
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

    /// <summary>
    /// The tensors in service. Pieces that single elements have changed in are hashed first, without holding up a commit; where commits
    /// keep coming in between, or the weights cannot be read now, their tensors have no digest this time.
    /// </summary>
    public (ulong Version, IReadOnlyList<DescribedWeight> Weights) Describe()
    {
        lock (_rehashing)
        {
            for (int i = 0; ; i++)
            {
                IReadOnlyList<ServedTensor> tensors;
                WeightSet weights;
                long changes;
                lock (_lock)
                {
                    bool readable = _writtenBy is null && _poison is null && !_asleep;
                    (tensors, weights, changes) = (_tensors, _current, _changes);
                    if (i == MostRehashes || !readable || !tensors.Any(tensor => tensor.IsStale)) return (_version, Descriptions(tensors));
                }

                if (Rehashed(tensors, weights, changes) is not { } rehashed) continue;
                lock (_lock)
                {
                    if (_changes != changes) continue;
                    _tensors = rehashed;
                    return (_version, Descriptions(rehashed));
                }
            }
        }
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
            _changes++;
        }
    }

    /// <summary>What will be in service once the update has committed: computed before, so that no step waits for it.</summary>
    public IReadOnlyList<ServedTensor> After(ActiveUpdate update, IReadOnlyList<ServedTensor> sent)
    {
        IReadOnlyList<ServedTensor> tensors;
        lock (_lock) tensors = _tensors; // only this update can commit; others that are hashed meanwhile are hashed again
        if (update.Manifest.Tensors.All(tensor => tensor.IsWhole))
            return update.Manifest.Partial ? With(tensors, sent) : sent;
        Dictionary<string, ServedTensor> byName = tensors.ToDictionary(tensor => tensor.Name);
        ServedTensor[] changed = [.. sent.Zip(update.Manifest.Tensors, After).DistinctBy(tensor => tensor.Name)];
        return update.Manifest.Partial ? With(tensors, changed) : changed;

        ServedTensor After(ServedTensor tensor, ManifestTensor manifest)
        {
            if (manifest.IsWhole) return tensor;
            bool exact = HoldsExactly(tensor.Description);
            if (manifest.SparseCount is null) return exact ? tensor : tensor with { Pieces = null, Changed = [] };
            return byName.TryGetValue(tensor.Name, out ServedTensor? old) ? old.With(tensor, exact) : tensor;
        }
    }

    /// <summary>Called by the loop between two steps: puts the update's weights in service.</summary>
    /// <param name="update">The update.</param>
    /// <param name="tensors">From <see cref="After"/>.</param>
    /// <exception cref="UpdateFailedException">It has ended already.</exception>
    public void Commit(ActiveUpdate update, IReadOnlyList<ServedTensor> tensors)
    {
        lock (_lock)
        {
            ThrowUnlessActive(update);
            if (update.Mode == UpdateMode.Staged) (_spare, _current) = (_current, _spare!);
            foreach (LoadPiece piece in PiecesOf(update.Manifest.Tensors)) _current.Holds(piece.Slot, update.Manifest.NewVersion);
            _tensors = tensors;
            _changes++;
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
            _changes++;
            lock (_memory)
            {
                if (keep) _current.MoveToHost();
                else _current.Discard();
                _spare?.Dispose();
            }

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
        lock (_lock) (_changes, _asleep) = (_changes + 1, true); // nothing is read any more
        lock (_memory)
        {
            // An update may still be writing to one of them; that one is freed when the process ends.
            if (_active is not { Mode: UpdateMode.InPlace }) _current.Dispose();
            if (_active is not { Mode: UpdateMode.Staged }) _spare?.Dispose();
        }
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

    /// <summary>Of each tensor once, however many slices it has.</summary>
    private IEnumerable<LoadPiece> PiecesOf(IEnumerable<ManifestTensor> tensors)
        => tensors.Select(tensor => tensor.Name).Distinct().SelectMany(name => plan[name].Pieces);

    private static DescribedWeight[] Descriptions(IReadOnlyList<ServedTensor> tensors) => [.. tensors.Select(tensor => tensor.Description)];

    /// <summary>The tensors, some of which are replaced.</summary>
    private ServedTensor[] With(IReadOnlyList<ServedTensor> old, IEnumerable<ServedTensor> changed)
    {
        Dictionary<string, ServedTensor> byName = changed.ToDictionary(tensor => tensor.Name);
        return [.. old.Select(tensor => byName.GetValueOrDefault(tensor.Name) ?? Follow(tensor))];

        // A tied head that is not among them has the bytes, and so the digest, of its original.
        ServedTensor Follow(ServedTensor tensor)
            => plan[tensor.Name] is { Tied: true } tied && byName.TryGetValue(tied.TiedTo, out ServedTensor? original)
                ? original with { Description = original.Description with { Name = tensor.Name } }
                : tensor;
    }

    /// <summary>Whether every weight of a tensor holds all values of its type, so that what was sent can be read back.</summary>
    private bool HoldsExactly(DescribedWeight tensor) => plan[tensor.Name].Pieces.All(piece =>
        (tensor.Type == DType.BFloat16 && (plan.Weights[piece.Slot.Index].IsVector || backend.WeightFormat != WeightFormat.Int8))
        || (tensor.Type == DType.Float32
            && (plan.Weights[piece.Slot.Index].IsVector || backend.WeightFormat == WeightFormat.Float32)));

    /// <summary>The tensors, all digests of which are known that can be; null where the weights changed meanwhile.</summary>
    private ServedTensor[]? Rehashed(IReadOnlyList<ServedTensor> tensors, WeightSet weights, long changes)
    {
        List<ServedTensor> rehashed = [];
        foreach (ServedTensor tensor in tensors.Where(tensor => tensor.IsStale && !plan[tensor.Name].Tied))
        {
            if (tensor.Rehashed((element, values) => TryRead(weights, changes, plan[tensor.Name], element, values)) is not { } known)
                return null;
            rehashed.Add(known);
        }

        return With(tensors, rehashed);
    }

    private bool TryRead(WeightSet weights, long changes, LoadEntry entry, long element, Span<float> values)
    {
        lock (_memory)
        {
            if (Volatile.Read(ref _changes) != changes) return false; // a set that is not in service may be written, or freed
            entry.Read(backend, weights, element, values);
            return true;
        }
    }

    /// <summary>Weights of which the update sends every element.</summary>
    private IEnumerable<WeightSlot> WholeWeights(UpdateManifest manifest)
        => PiecesOf(manifest.Tensors.Where(tensor => tensor.SparseCount is null))
            .GroupBy(piece => piece.Slot, piece => piece.Elements)
            .Where(sent => sent.Sum() == _current[sent.Key].Outputs * (long)_current[sent.Key].Inputs)
            .Select(sent => sent.Key);
}
