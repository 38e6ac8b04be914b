using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// A step's indices on the device, uploaded in one copy of only the bytes that the step needs; its answers are copied back the same way.
/// The host has two buffers of each, used in turn: while the device works on one step, the next is written, and the answers of the previous
/// one are read.
/// <para>
/// The addresses passed as kernel arguments depend on the padded numbers of rows and queries alone, so that decode steps of one bucket have
/// equal arguments. Kernels find data that varies more through the <see cref="Header"/>.
/// </para>
/// </summary>
internal sealed unsafe class CudaStep : IDisposable
{
    private readonly CudaDevice _device;
    private readonly (int Rows, int Sequences, int Blocks, int Queries, int Alternatives) _room;
    private readonly Side[] _sides;
    private readonly DeviceBuffer _indices, _answers;
    private readonly long _alternativeIds, _alternativeLogProbs;
    private DeviceBuffer _biases; // ids, then values; grows with the requests' biases
    private int _side;

    // Of the step begun last.
    private long _tokens, _positions, _sequences, _outputRows, _rowSlots, _queries, _items, _tables, _otherItems, _end;

    public CudaStep(CudaDevice device, StepLayout step)
    {
        _device = device;
        _room = RoomOf(step);
        Place(_room.Rows, _room.Queries, CudaAttentionPlan.MostItems(step), (long)_room.Sequences * _room.Blocks);
        long sent = After(_end, CudaAttentionPlan.MostItems(step), CudaAttentionPlan.ItemNumbers * sizeof(int)); // a plan may be made twice
        _indices = device.Allocate(sent);
        _biases = device.Allocate(BiasBytes(step.BiasIds.Length));

        long end = After(0, _room.Queries, sizeof(SampleResult));
        end = After(_alternativeIds = end, _room.Alternatives, sizeof(int));
        end = After(_alternativeLogProbs = end, _room.Alternatives, sizeof(float));
        _answers = device.AllocateZeroed(end);
        _sides = [.. Enumerable.Range(0, 2).Select(_ => new Side(
            device.AllocatePinned(sent), device.AllocatePinned(_biases.Bytes), device.AllocatePinned(end), device.CreateEvent()))];
    }

    /// <summary>Of a step.</summary>
    public int MostSequences => _room.Sequences;

    // ---- On the device.

    /// <summary>Values that kernels read from memory, since they differ between steps with equal arguments. As in common.cuh.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct StepHeader
    {
        /// <summary>Numbers of attention items and of sample queries: launches are rounded up.</summary>
        public int Items, Queries;

        /// <summary>Blocks of a sequence's row of the block tables.</summary>
        public int TableStride;

        /// <summary>Bytes from the header on.</summary>
        public int ItemsAt, TablesAt;

        public int Padding;

        public ulong BiasIds, BiasValues;
    }

    public nuint Header => _indices.Pointer;

    public nuint Tokens => _indices.Pointer + (nuint)_tokens;

    public nuint Positions => _indices.Pointer + (nuint)_positions;

    /// <summary>Of every row.</summary>
    public nuint Sequences => _indices.Pointer + (nuint)_sequences;

    public nuint OutputRows => _indices.Pointer + (nuint)_outputRows;

    public nuint RowSlots => _indices.Pointer + (nuint)_rowSlots;

    public nuint Queries => _indices.Pointer + (nuint)_queries;

    public nuint Results => _answers.Pointer;

    public nuint AlternativeIds => _answers.Pointer + (nuint)_alternativeIds;

    public nuint AlternativeLogProbs => _answers.Pointer + (nuint)_alternativeLogProbs;

    /// <summary>Whether a step of this layout's capacity fits.</summary>
    public bool Holds(StepLayout step)
    {
        (int Rows, int Sequences, int Blocks, int Queries, int Alternatives) needed = RoomOf(step);
        return needed.Rows <= _room.Rows && needed.Sequences <= _room.Sequences && needed.Blocks == _room.Blocks
            && needed.Queries <= _room.Queries
            && needed.Alternatives <= _room.Alternatives;
    }

    /// <summary>Decides where everything is, and copies nothing: for a rehearsal.</summary>
    /// <param name="rows">Padded.</param>
    /// <param name="queries">Padded.</param>
    public void Place(int rows, int queries) => Place(rows, queries, 0, 0);

    /// <summary>Queues the copy. Unread answers of the step before the last are lost.</summary>
    /// <param name="step">What to copy.</param>
    /// <param name="ordinal">Of the step; above 0.</param>
    /// <param name="rowSequence">The sequence of every row.</param>
    /// <param name="plan">Of its attention.</param>
    /// <param name="rows">Rows that kernels run over; those past the step's are of sequence 0, token 0 and position 0.</param>
    /// <param name="queries">Queries that kernels run over; those past the step's are ignored.</param>
    public void Upload(StepLayout step, long ordinal, int[] rowSequence, CudaAttentionPlan plan, int rows, int queries)
    {
        if (_sides[_side].Step == step)
            _sides[_side].Step = null; // begun again, and never finished
        _side ^= 1;
        Side side = _sides[_side];
        if (side.Busy)
            side.Done.Synchronize(); // what is being sent may not change
        (side.Step, side.Ordinal, side.Busy) = (step, ordinal, true);

        int stride = TableStride(step);
        Place(rows, queries, plan.ItemCount, (long)step.SequenceCount * stride);
        SendBiases(step, side);
        Copy([HeaderOf(plan, step.QueryCount, stride)], 0, 1);
        Copy(step.TokenIds.AsSpan(0, step.RowCount), _tokens, rows);
        Copy(step.Positions.AsSpan(0, step.RowCount), _positions, rows);
        Copy(rowSequence.AsSpan(0, step.RowCount), _sequences, rows);
        Copy(step.OutputRows.AsSpan(0, step.OutputCount), _outputRows, rows);
        Copy(plan.RowSlots.AsSpan(0, step.RowCount), _rowSlots, rows);
        Copy(step.Queries.AsSpan(0, step.QueryCount), _queries, step.QueryCount);
        Copy(plan.Items.AsSpan(0, CudaAttentionPlan.ItemNumbers * plan.ItemCount), _items, CudaAttentionPlan.ItemNumbers * plan.ItemCount);
        for (int s = 0; s < step.SequenceCount; s++)
            Copy(step.BlockTables.AsSpan(s * step.MaxBlocks, BlocksOf(step, s)), _tables + ((long)s * stride * sizeof(int)), stride);
        Driver.cuMemcpyHtoDAsync_v2(_indices.Pointer, side.Sent.Pointer, (nuint)_end, _device.Stream.Value).ThrowIfFailed(_end);
        side.Done.Record(_device.Stream);
    }

    /// <summary>Queues the copy of the attention plan alone, when the last one was made for other heads.</summary>
    public void Upload(StepLayout step, CudaAttentionPlan plan)
    {
        _device.Stream.Synchronize(); // what is being sent may not change
        // Written after everything else, over an earlier plan for other heads: it may have more items than the first one.
        (_items, _end) = (_otherItems, After(_otherItems, plan.ItemCount, CudaAttentionPlan.ItemNumbers * sizeof(int)));
        Copy([HeaderOf(plan, step.QueryCount, TableStride(step))], 0, 1);
        Copy(plan.RowSlots.AsSpan(0, step.RowCount), _rowSlots, step.RowCount);
        Copy(plan.Items.AsSpan(0, CudaAttentionPlan.ItemNumbers * plan.ItemCount), _items, CudaAttentionPlan.ItemNumbers * plan.ItemCount);
        PinnedBuffer sent = _sides[_side].Sent;
        Driver.cuMemcpyHtoDAsync_v2(_indices.Pointer, sent.Pointer, (nuint)_end, _device.Stream.Value).ThrowIfFailed(_end);
    }

    /// <summary>Queues the copy of the answers of the step uploaded last.</summary>
    public void Download()
    {
        Side side = _sides[_side];
        StepLayout step = side.Step!;
        CopyBack(0, (long)step.QueryCount * sizeof(SampleResult));
        int alternatives = 0;
        for (int q = 0; q < step.QueryCount; q++)
        {
            alternatives = step.Queries[q].AlternativesCount == 0
                ? alternatives
                : Math.Max(alternatives, step.Queries[q].AlternativesStart + step.Queries[q].AlternativesCount);
        }

        if (alternatives > 0)
        {
            CopyBack(_alternativeIds, (long)alternatives * sizeof(int));
            CopyBack(_alternativeLogProbs, (long)alternatives * sizeof(float));
        }

        side.Done.Record(_device.Stream);

        void CopyBack(long place, long bytes) =>
            Driver.cuMemcpyDtoHAsync_v2(side.Answered.Pointer + place, _answers.Pointer + (nuint)place, (nuint)bytes, _device.Stream.Value)
                .ThrowIfFailed(bytes);
    }

    /// <summary>
    /// Waits for a step's answers: the only wait of a step. Returns its ordinal; 0 when it is not among the last two, or was finished.
    /// </summary>
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
            new ReadOnlySpan<int>(side.Answered.Pointer + _alternativeIds, _room.Alternatives)[range]
                .CopyTo(step.AlternativeIds.AsSpan(range));
            new ReadOnlySpan<float>(side.Answered.Pointer + _alternativeLogProbs, _room.Alternatives)[range]
                .CopyTo(step.AlternativeLogProbs.AsSpan(range));
        }

        return side.Ordinal;
    }

    /// <summary>
    /// Replaces one that has become too small, once its steps are done. The last step's answers stay on the device: the next step may read
    /// them.
    /// </summary>
    /// <returns>A step whose answers were read meanwhile; it need not be finished any more.</returns>
    public StepLayout? TakeOver(CudaStep old)
    {
        StepLayout? inFlight = old._sides[old._side].Step;
        if (inFlight is not null)
            _ = old.Finish(inFlight);
        nuint bytes = (nuint)Math.Min(old._room.Queries, _room.Queries) * (nuint)sizeof(SampleResult);
        Driver.cuMemcpyDtoDAsync_v2(Results, old.Results, bytes, _device.Stream.Value).ThrowIfFailed((long)bytes);
        _device.Stream.Synchronize();
        old.Dispose();
        return inFlight;
    }

    public void Dispose()
    {
        foreach (Side side in _sides)
            side.Dispose();
        _indices.Dispose();
        _biases.Dispose();
        _answers.Dispose();
    }

    /// <summary>Parts in order, each aligned so that no two share a cache line.</summary>
    private void Place(int rows, int queries, int items, long tables)
    {
        _tokens = After(0, 1, sizeof(StepHeader));
        _positions = After(_tokens, rows, sizeof(int));
        _sequences = After(_positions, rows, sizeof(int));
        _outputRows = After(_sequences, rows, sizeof(int));
        _rowSlots = After(_outputRows, rows, sizeof(int));
        _queries = After(_rowSlots, rows, sizeof(int));
        _items = After(_queries, queries, sizeof(SampleQuery));
        _tables = After(_items, items, CudaAttentionPlan.ItemNumbers * sizeof(int));
        _end = _otherItems = After(_tables, tables, sizeof(int));
    }

    private static long After(long start, long count, int bytes) => (start + (count * bytes) + 127) / 128 * 128;

    private StepHeader HeaderOf(CudaAttentionPlan plan, int queries, int stride) => new()
    {
        Items = plan.ItemCount,
        Queries = queries,
        TableStride = stride,
        ItemsAt = (int)_items,
        TablesAt = (int)_tables,
        BiasIds = _biases.Pointer,
        BiasValues = _biases.Pointer + (nuint)(_biases.Bytes / 2),
    };

    /// <summary>Blocks of the longest context of the step.</summary>
    private static int TableStride(StepLayout step)
    {
        int most = 1;
        for (int s = 0; s < step.SequenceCount; s++)
            most = Math.Max(most, BlocksOf(step, s));
        return most;
    }

    private static int BlocksOf(StepLayout step, int s) =>
        step.RowStart[s + 1] == step.RowStart[s] ? 0 : (step.Positions[step.RowStart[s + 1] - 1] / KvCache.BlockTokens) + 1;

    /// <summary>Bytes of ids, then of values.</summary>
    private static long BiasBytes(int biases) => 2 * After(0, biases, sizeof(int));

    /// <summary>Copies the step's biases; most steps have none.</summary>
    private void SendBiases(StepLayout step, Side side)
    {
        int count = 0;
        for (int q = 0; q < step.QueryCount; q++)
            count = step.Queries[q].BiasCount == 0 ? count : Math.Max(count, step.Queries[q].BiasStart + step.Queries[q].BiasCount);
        if (count == 0)
            return;
        long half = BiasBytes(step.BiasIds.Length) / 2;
        if (2 * half > _biases.Bytes)
        {
            _biases.Dispose(); // waits for the step that reads it
            _biases = _device.Allocate(2 * half);
        }

        if (_biases.Bytes > side.Biases.Bytes)
            side.GrowBiases(_device.AllocatePinned(_biases.Bytes));
        half = _biases.Bytes / 2;
        int bytes = count * sizeof(int);
        MemoryMarshal.AsBytes(step.BiasIds.AsSpan(0, count)).CopyTo(new Span<byte>(side.Biases.Pointer, bytes));
        MemoryMarshal.AsBytes(step.BiasValues.AsSpan(0, count)).CopyTo(new Span<byte>(side.Biases.Pointer + half, bytes));
        Driver.cuMemcpyHtoDAsync_v2(_biases.Pointer, side.Biases.Pointer, (nuint)bytes, _device.Stream.Value).ThrowIfFailed(bytes);
        Driver.cuMemcpyHtoDAsync_v2(_biases.Pointer + (nuint)half, side.Biases.Pointer + half, (nuint)bytes, _device.Stream.Value)
            .ThrowIfFailed(bytes);
    }

    private static (int Rows, int Sequences, int Blocks, int Queries, int Alternatives) RoomOf(StepLayout step) =>
        (step.TokenIds.Length, step.RowStart.Length - 1, step.MaxBlocks, step.Queries.Length, step.AlternativeIds.Length);

    /// <summary>
    /// The host's buffers: what is uploaded, what is read back, and the event after the last copy. Step: the one that uses them, until it
    /// is finished.
    /// </summary>
    private sealed record Side(PinnedBuffer Sent, PinnedBuffer FirstBiases, PinnedBuffer Answered, CudaEvent Done) : IDisposable
    {
        public StepLayout? Step { get; set; }

        public long Ordinal { get; set; }

        /// <summary>Whether the event has still to be waited for.</summary>
        public bool Busy { get; set; }

        public PinnedBuffer Biases { get; private set; } = FirstBiases;

        public void GrowBiases(PinnedBuffer larger)
        {
            Biases.Dispose();
            Biases = larger;
        }

        public void Dispose()
        {
            Sent.Dispose();
            Biases.Dispose();
            Answered.Dispose();
            Done.Dispose();
        }
    }

    /// <summary>Copies elements to the pinned buffer, and zeros up to the padded count.</summary>
    private void Copy<T>(ReadOnlySpan<T> source, long place, int padded)
        where T : unmanaged
    {
        Span<T> to = new(_sides[_side].Sent.Pointer + place, padded);
        source.CopyTo(to);
        to[source.Length..].Clear();
    }
}
