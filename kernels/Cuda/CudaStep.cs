using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// A step's indices on the device, in one copy; and its answers, back in one. Every part has its place, so that pointers do not change from step to
/// step; block tables come last, since a step uses little of the room they may need. On the host there are two of each, in turn: while the device works on
/// one step, the next is written, and the answers of the one before are read.
/// </summary>
internal sealed unsafe class CudaStep : IDisposable
{
    private readonly CudaDevice _device;
    private readonly (int Rows, int Sequences, int Blocks, int Queries, int Biases, int Alternatives) _room;
    private readonly Side[] _sides;
    private readonly DeviceBuffer _indices, _answers;
    private int _side;
    private readonly long _tokens, _positions, _sequences, _outputRows, _rowSlots, _items, _queries, _biasIds, _biasValues, _tables;
    private readonly long _alternativeIds, _alternativeLogProbs;

    public CudaStep(CudaDevice device, StepLayout step)
    {
        _device = device;
        _room = RoomOf(step);
        long end = Place(0, 3, sizeof(int));
        end = Place(_tokens = end, _room.Rows, sizeof(int));
        end = Place(_positions = end, _room.Rows, sizeof(int));
        end = Place(_sequences = end, _room.Rows, sizeof(int));
        end = Place(_outputRows = end, _room.Rows, sizeof(int));
        end = Place(_rowSlots = end, _room.Rows, sizeof(int));
        end = Place(_items = end, CudaAttentionPlan.MostItems(step), CudaAttentionPlan.ItemNumbers * sizeof(int));
        end = Place(_queries = end, _room.Queries, sizeof(SampleQuery));
        end = Place(_biasIds = end, _room.Biases, sizeof(int));
        end = Place(_biasValues = end, _room.Biases, sizeof(float));
        end = Place(_tables = end, (long)_room.Sequences * _room.Blocks, sizeof(int));
        _indices = device.Allocate(end);
        long sent = end;

        end = Place(0, _room.Queries, sizeof(SampleResult));
        end = Place(_alternativeIds = end, _room.Alternatives, sizeof(int));
        end = Place(_alternativeLogProbs = end, _room.Alternatives, sizeof(float));
        _answers = device.AllocateZeroed(end);
        _sides = [.. Enumerable.Range(0, 2).Select(_ => new Side(device.AllocatePinned(sent), device.AllocatePinned(end), device.CreateEvent()))];

        // Each part on a boundary of its own: no two share a line.
        static long Place(long start, long count, int bytes) => (start + (Math.Max(1, count) * bytes) + 255) / 256 * 256;
    }

    // ---- On the device.

    /// <summary>Items of attention, queries, and blocks of a sequence's table: launches do not say them.</summary>
    public nuint Counts => _indices.Pointer;

    public nuint Tokens => _indices.Pointer + (nuint)_tokens;

    public nuint Positions => _indices.Pointer + (nuint)_positions;

    /// <summary>Of every row.</summary>
    public nuint Sequences => _indices.Pointer + (nuint)_sequences;

    public nuint OutputRows => _indices.Pointer + (nuint)_outputRows;

    public nuint RowSlots => _indices.Pointer + (nuint)_rowSlots;

    public nuint Items => _indices.Pointer + (nuint)_items;

    public nuint Queries => _indices.Pointer + (nuint)_queries;

    public nuint BiasIds => _indices.Pointer + (nuint)_biasIds;

    public nuint BiasValues => _indices.Pointer + (nuint)_biasValues;

    /// <summary>Block tables, as many blocks a sequence as <see cref="Counts"/> says.</summary>
    public nuint Tables => _indices.Pointer + (nuint)_tables;

    public nuint Results => _answers.Pointer;

    public nuint AlternativeIds => _answers.Pointer + (nuint)_alternativeIds;

    public nuint AlternativeLogProbs => _answers.Pointer + (nuint)_alternativeLogProbs;

    /// <summary>Whether a step as large as this may be has its place here.</summary>
    public bool Holds(StepLayout step)
    {
        var needed = RoomOf(step);
        return needed.Rows <= _room.Rows && needed.Sequences <= _room.Sequences && needed.Blocks == _room.Blocks && needed.Queries <= _room.Queries
            && needed.Biases <= _room.Biases && needed.Alternatives <= _room.Alternatives;
    }

    /// <summary>Queues the copy. Answers of the step before the last that nobody asked for are gone with it.</summary>
    /// <param name="step">What to copy.</param>
    /// <param name="ordinal">Of the step; above 0.</param>
    /// <param name="rowSequence">The sequence of every row.</param>
    /// <param name="plan">Of its attention.</param>
    /// <param name="padded">Rows that kernels run over; those past the step's are of no sequence, token 0 and row 0.</param>
    public void Upload(StepLayout step, long ordinal, int[] rowSequence, CudaAttentionPlan plan, int padded)
    {
        if (_sides[_side].Step == step)
            _sides[_side].Step = null; // begun again, and never finished
        _side ^= 1;
        Side side = _sides[_side];
        if (side.Busy)
            side.Done.Synchronize(); // what is being sent may not change
        (side.Step, side.Ordinal, side.Busy) = (step, ordinal, true);
        int rows = step.RowCount;
        Copy((ReadOnlySpan<int>)[plan.ItemCount, step.QueryCount, TableStride(step)], 0);
        Copy(step.TokenIds, rows, _tokens);
        new Span<int>(side.Sent.Pointer + _tokens, padded)[rows..].Clear();
        new Span<int>(side.Sent.Pointer + _outputRows, padded)[step.OutputCount..].Clear();
        Copy(step.Positions, rows, _positions);
        Copy(rowSequence, rows, _sequences);
        Copy(step.OutputRows, step.OutputCount, _outputRows);
        Copy(plan.RowSlots, rows, _rowSlots);
        Copy(plan.Items, CudaAttentionPlan.ItemNumbers * plan.ItemCount, _items);
        Copy(step.Queries, step.QueryCount, _queries);
        Copy(step.BiasIds, step.BiasIds.Length, _biasIds);
        Copy(step.BiasValues, step.BiasValues.Length, _biasValues);
        nuint bytes = (nuint)(_tables + CopyTables(step));
        Driver.cuMemcpyHtoDAsync_v2(_indices.Pointer, side.Sent.Pointer, bytes, _device.Stream.Value).ThrowIfFailed((long)bytes);
        side.Done.Record(_device.Stream);
    }

    /// <summary>The blocks that the step's contexts have. Returns their bytes.</summary>
    private long CopyTables(StepLayout step)
    {
        int stride = TableStride(step);
        for (int s = 0; s < step.SequenceCount; s++)
            Copy(step.BlockTables.AsSpan(s * step.MaxBlocks, BlocksOf(step, s)), _tables + ((long)s * stride * sizeof(int)));
        return (long)step.SequenceCount * stride * sizeof(int);
    }

    /// <summary>Blocks of the longest context: most are far shorter than they may be.</summary>
    private static int TableStride(StepLayout step)
    {
        int most = 1;
        for (int s = 0; s < step.SequenceCount; s++)
            most = Math.Max(most, BlocksOf(step, s));
        return most;
    }

    private static int BlocksOf(StepLayout step, int s) =>
        step.RowStart[s + 1] == step.RowStart[s] ? 0 : (step.Positions[step.RowStart[s + 1] - 1] / KvCache.BlockTokens) + 1;

    /// <summary>The attention plan alone, where it was made for other heads.</summary>
    public void Upload(CudaAttentionPlan plan, int rows)
    {
        _device.Stream.Synchronize(); // what is being sent may not change
        Copy((ReadOnlySpan<int>)[plan.ItemCount], 0);
        PinnedBuffer sent = _sides[_side].Sent;
        Driver.cuMemcpyHtoDAsync_v2(Counts, sent.Pointer, sizeof(int), _device.Stream.Value).ThrowIfFailed();
        Copy(plan.RowSlots, rows, _rowSlots);
        Copy(plan.Items, CudaAttentionPlan.ItemNumbers * plan.ItemCount, _items);
        Driver.cuMemcpyHtoDAsync_v2(RowSlots, sent.Pointer + _rowSlots, (nuint)(_queries - _rowSlots), _device.Stream.Value).ThrowIfFailed();
    }

    /// <summary>Queues the copy of the answers of the step uploaded last.</summary>
    public void Download()
    {
        Side side = _sides[_side];
        StepLayout step = side.Step!;
        long bytes = !HasAlternatives(step)
            ? (long)step.QueryCount * sizeof(SampleResult)
            : _alternativeLogProbs + (_room.Alternatives * sizeof(float));
        Driver.cuMemcpyDtoHAsync_v2(side.Answered.Pointer, _answers.Pointer, (nuint)bytes, _device.Stream.Value).ThrowIfFailed(bytes);
        side.Done.Record(_device.Stream);
    }

    /// <summary>Waits for a step's answers: the one time that a step does. Its ordinal; 0 when it is not among the last two, or was finished.</summary>
    public long Finish(StepLayout step)
    {
        Side? side = _sides[0].Step == step ? _sides[0] : _sides[1].Step == step ? _sides[1] : null;
        if (side is null)
            return 0;
        side.Done.Synchronize();
        (side.Step, side.Busy) = (null, false);
        new ReadOnlySpan<SampleResult>(side.Answered.Pointer, step.QueryCount).CopyTo(step.Results);
        for (int q = 0; q < step.QueryCount; q++)
        {
            ref readonly SampleQuery query = ref step.Queries[q];
            if (query.AlternativesCount == 0 || step.Results[q].Token < 0)
                continue;
            Range range = query.AlternativesStart..(query.AlternativesStart + query.AlternativesCount);
            new ReadOnlySpan<int>(side.Answered.Pointer + _alternativeIds, _room.Alternatives)[range].CopyTo(step.AlternativeIds.AsSpan(range));
            new ReadOnlySpan<float>(side.Answered.Pointer + _alternativeLogProbs, _room.Alternatives)[range]
                .CopyTo(step.AlternativeLogProbs.AsSpan(range));
        }

        return side.Ordinal;
    }

    /// <summary>Takes the place of one that has become too small, once its steps are done. The last step's answers stay on the device: the next may ask for them.</summary>
    /// <returns>A step whose answers were read on the way; it need not be finished any more.</returns>
    public StepLayout? TakeOver(CudaStep old)
    {
        StepLayout? underWay = old._sides[old._side].Step;
        if (underWay is not null)
            _ = old.Finish(underWay);
        nuint bytes = (nuint)Math.Min(old._room.Queries, _room.Queries) * (nuint)sizeof(SampleResult);
        Driver.cuMemcpyDtoDAsync_v2(Results, old.Results, bytes, _device.Stream.Value).ThrowIfFailed((long)bytes);
        _device.Stream.Synchronize();
        old.Dispose();
        return underWay;
    }

    public void Dispose()
    {
        foreach (Side side in _sides)
            side.Dispose();
        _indices.Dispose();
        _answers.Dispose();
    }

    private static bool HasAlternatives(StepLayout step)
    {
        for (int q = 0; q < step.QueryCount; q++)
        {
            if (step.Queries[q].AlternativesCount > 0)
                return true;
        }

        return false;
    }

    private static (int Rows, int Sequences, int Blocks, int Queries, int Biases, int Alternatives) RoomOf(StepLayout step) =>
        (step.TokenIds.Length, step.RowStart.Length - 1, step.MaxBlocks, step.Queries.Length, step.BiasIds.Length, step.AlternativeIds.Length);

    /// <summary>The host's part: what is sent, what comes back, and the event after the last of it. Step: whose it is, until that is finished.</summary>
    private sealed record Side(PinnedBuffer Sent, PinnedBuffer Answered, CudaEvent Done) : IDisposable
    {
        public StepLayout? Step { get; set; }

        public long Ordinal { get; set; }

        /// <summary>Whether the event has still to be waited for.</summary>
        public bool Busy { get; set; }

        public void Dispose()
        {
            Sent.Dispose();
            Answered.Dispose();
            Done.Dispose();
        }
    }

    private void Copy<T>(T[] source, int count, long place)
        where T : unmanaged => Copy((ReadOnlySpan<T>)source.AsSpan(0, count), place);

    private void Copy<T>(ReadOnlySpan<T> source, long place)
        where T : unmanaged => MemoryMarshal.AsBytes(source).CopyTo(new Span<byte>(_sides[_side].Sent.Pointer + place, source.Length * Unsafe.SizeOf<T>()));
}
