using System.Diagnostics;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// The weights in service, the spare set beside them, the one seat of whoever changes them, and whether they can be trusted. The loop
/// reads <see cref="Current"/> and commits; everything else comes from any thread.
/// </summary>
internal sealed class ServedWeights(IBackend backend, LoadPlan plan, int layers, WeightSet loaded, IReadOnlyList<DescribedWeight> described)
    : IDisposable
{
    private readonly Lock _seat = new();
    private WeightSet _current = loaded;
    private WeightSet? _spare; // taken at the first staged update
    private IReadOnlyList<DescribedWeight> _described = described;
    private ulong _version;
    private volatile WeightUpdate? _update;
    private volatile string? _poison;
    private volatile bool _asleep;

    public WeightSet Current => _current;

    /// <summary>Of the last commit; 0 is the checkpoint as loaded.</summary>
    public ulong Version => Volatile.Read(ref _version);

    /// <summary>Why the weights in service are no model's, or null.</summary>
    public string? Poison => _poison;

    /// <summary>The update that holds the seat, or null.</summary>
    public WeightUpdate? Updating => _update;

    public (ulong Version, IReadOnlyList<DescribedWeight> Weights) Describe()
    {
        lock (_seat) return (_version, _described);
    }

    /// <inheritdoc cref="RolloutEngine.BeginUpdate"/>
    public WeightUpdate Begin(RolloutEngine engine, UpdateManifest manifest, IReadOnlyList<Problem> alsoWrong)
    {
        long started = Stopwatch.GetTimestamp();
        lock (_seat)
        {
            if (_update is { } other)
                throw new EngineStateException(engine.Status.State, $"'{other.Manifest.Owner}' is updating the weights to version {other.Manifest.NewVersion}");
            if (_asleep) throw new EngineStateException(EngineState.Sleeping, "the weights are asleep: wake them before an update");
            IReadOnlyList<Problem> problems = [.. alsoWrong, .. UpdatePreflight.Check(manifest, plan, backend.WeightFormat, _version, _poison)];
            if (problems.Count > 0) throw new UpdateRejectedException(problems);

            UpdateMode mode = ModeOf(manifest);
            if (mode == UpdateMode.Staged) _spare ??= WeightSet.Allocate(backend, plan, layers);
            WeightSet destination = mode == UpdateMode.Staged ? _spare! : _current;
            double seconds = Stopwatch.GetElapsedTime(started).TotalSeconds;
            return _update = new WeightUpdate(engine, manifest, mode, plan, backend, destination, seconds);
        }
    }

    /// <summary>
    /// Staged, before the first byte: what the update changes counts as unknown from here on, and what it leaves alone is, in the spare set,
    /// as it is in service.
    /// </summary>
    public void Open(WeightUpdate update)
    {
        WeightSet destination = _spare!;
        if (!update.Manifest.IsFull)
        {
            WeightSlot[] behind = [.. destination.NotHolding(_current).Except(WholeSlots(update.Manifest))];
            AllCores.ForEach([.. behind.OrderByDescending(slot => _current[slot].Bytes)], slot =>
            {
                backend.CopyWeight(_current[slot], destination[slot]);
                destination.Holds(slot, _current.VersionOf(slot)!.Value);
            });
        }

        MarkUnknown(destination, update.Manifest);
    }

    /// <summary>On the loop, between two steps: what the update brought is served from here on.</summary>
    /// <exception cref="UpdateFailedException">It has lost the seat.</exception>
    public void Commit(WeightUpdate update, IReadOnlyList<DescribedWeight> described)
    {
        lock (_seat)
        {
            ThrowUnlessSeated(update);
            if (update.Mode == UpdateMode.Staged) (_spare, _current) = (_current, _spare!);
            foreach (ManifestTensor tensor in update.Manifest.Tensors)
                _current.Holds(plan[tensor.Name].Slot, update.Manifest.NewVersion);
            _described = update.Manifest.Partial ? Merge(_described, described) : described;
            Volatile.Write(ref _version, update.Manifest.NewVersion);
            _poison = null; // only a full update gets here while there is one
            _update = null;
        }
    }

    /// <exception cref="UpdateFailedException">The update has lost the seat.</exception>
    public void ThrowUnlessSeated(WeightUpdate update)
    {
        if (_update != update) throw new UpdateFailedException(update.Failure, "the update was ended before its moment came");
    }

    /// <summary>The seat is free again. What landed in the weights in service poisons them.</summary>
    public void End(WeightUpdate update)
    {
        lock (_seat)
        {
            if (_update != update) return;
            if (update.HasTouchedServedWeights)
            {
                // Not before a byte has landed: what is in service stays known, and partial updates go on building on it.
                MarkUnknown(_current, update.Manifest);
                _poison = $"the update in place to version {update.Manifest.NewVersion} by '{update.Manifest.Owner}' ended half-way "
                    + $"({update.Failure.ToString().ToLowerInvariant()})";
            }

            _update = null;
        }
    }

    /// <summary>Gives the memory of both sets back. Bytes allocated.</summary>
    /// <exception cref="EngineStateException">An update is under way.</exception>
    public long Discard(EngineState state)
    {
        lock (_seat)
        {
            if (_update is { } update) throw new EngineStateException(state, $"'{update.Manifest.Owner}' is updating the weights");
            long bytes = _current.Bytes + (_spare?.Bytes ?? 0);
            _current.Discard();
            _spare?.Dispose();
            _spare = null;
            _asleep = true;
            return bytes;
        }
    }

    /// <summary>Takes the memory of one set again. What it held is gone.</summary>
    /// <exception cref="OutOfMemoryException">The device has not got it; what sleeps goes on sleeping.</exception>
    public void Restore()
    {
        lock (_seat)
        {
            _current.Restore();
            _poison = "the weights were discarded by sleep";
            _asleep = false;
        }
    }

    public void Dispose()
    {
        // Somebody may still be writing into one of them: that one goes with the process.
        if (_update is not { Mode: UpdateMode.InPlace }) _current.Dispose();
        if (_update is not { Mode: UpdateMode.Staged }) _spare?.Dispose();
    }

    /// <exception cref="NoRoomException">Staging was asked for and there is no memory.</exception>
    private UpdateMode ModeOf(UpdateManifest manifest)
    {
        if (manifest.Mode == UpdateMode.InPlace) return UpdateMode.InPlace;
        long available = _spare is null ? backend.AvailableBytes : long.MaxValue;
        // A quarter more: what is in flight needs some, too.
        if (_current.Bytes / 4 * 5 <= available) return UpdateMode.Staged;
        return manifest.Mode == UpdateMode.Auto ? UpdateMode.InPlace
            : throw new NoRoomException($"staging takes {_current.Bytes} bytes, the device has {available} left: update in place");
    }

    private void MarkUnknown(WeightSet set, UpdateManifest manifest)
    {
        foreach (ManifestTensor tensor in manifest.Tensors) set.Changing(plan[tensor.Name].Slot);
    }

    private DescribedWeight[] Merge(IReadOnlyList<DescribedWeight> old, IReadOnlyList<DescribedWeight> changed)
    {
        Dictionary<string, DescribedWeight> byName = changed.ToDictionary(weight => weight.Name);
        return [.. old.Select(weight => byName.GetValueOrDefault(weight.Name) ?? Follow(weight))];

        // A tied head that is not sent this time has the bytes, and so the digest, of its original.
        DescribedWeight Follow(DescribedWeight weight)
            => plan[weight.Name] is { Tied: true } tied && byName.TryGetValue(plan.OriginalOf(tied).Source, out DescribedWeight? original)
                ? original with { Name = weight.Name }
                : weight;
    }

    /// <summary>Slots of which the update sends every element.</summary>
    private IEnumerable<WeightSlot> WholeSlots(UpdateManifest manifest)
        => manifest.Tensors.Where(tensor => tensor.SparseCount is null && !plan[tensor.Name].Tied)
            .GroupBy(tensor => plan[tensor.Name].Slot, tensor => tensor.Elements)
            .Where(sent => sent.Sum() == _current[sent.Key].Outputs * (long)_current[sent.Key].Inputs)
            .Select(sent => sent.Key);
}
