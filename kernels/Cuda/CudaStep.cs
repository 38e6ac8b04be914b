using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// A step's indices on the device, in one copy; and its answers, back in one. Every part has its place, so that pointers do not change from step to
/// step; block tables come last, since a step uses little of the room they may need.
/// </summary>
internal sealed unsafe class CudaStep : IDisposable
{
    private readonly CudaDevice _device;
    private readonly (int Rows, int Sequences, int Blocks, int Queries, int Biases, int Alternatives) _room;
    private readonly PinnedBuffer _sent, _answered;
    private readonly DeviceBuffer _indices, _answers;
    private readonly long _tokens, _positions, _sequences, _outputRows, _rowSlots, _items, _queries, _biasIds, _biasValues, _tables;
    private readonly long _alternativeIds, _alternativeLogProbs;

    public CudaStep(CudaDevice device, StepLayout step)
    {
        _device = device;
        _room = RoomOf(step);
        long end = Place(0, 2, sizeof(int));
        end = Place(_tokens = end, _room.Rows, sizeof(int));
        end = Place(_positions = end, _room.Rows, sizeof(int));
        end = Place(_sequences = end, _room.Rows, sizeof(int));
        end = Place(_outputRows = end, _room.Rows, sizeof(int));
        end = Place(_rowSlots = end, _room.Rows, sizeof(int));
        end = Place(_items = end, CudaAttentionPlan.MostItems(step), 5 * sizeof(int));
        end = Place(_queries = end, _room.Queries, sizeof(SampleQuery));
        end = Place(_biasIds = end, _room.Biases, sizeof(int));
        end = Place(_biasValues = end, _room.Biases, sizeof(float));
        end = Place(_tables = end, (long)_room.Sequences * _room.Blocks, sizeof(int));
        _sent = device.AllocatePinned(end);
        _indices = device.Allocate(end);

        end = Place(0, _room.Queries, sizeof(SampleResult));
        end = Place(_alternativeIds = end, _room.Alternatives, sizeof(int));
        end = Place(_alternativeLogProbs = end, _room.Alternatives, sizeof(float));
        _answered = device.AllocatePinned(end);
        _answers = device.Allocate(end);

        // Each part on a boundary of its own: no two share a line.
        static long Place(long start, long count, int bytes) => (start + (Math.Max(1, count) * bytes) + 255) / 256 * 256;
    }

    // ---- On the device.

    /// <summary>Items of attention, and queries: launches are rounded up.</summary>
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

    /// <summary>Queues the copy. What was copied last time must have arrived: the answers of that step are in, or its stream was waited for.</summary>
    /// <param name="step">What to copy.</param>
    /// <param name="rowSequence">The sequence of every row.</param>
    /// <param name="plan">Of its attention.</param>
    /// <param name="padded">Rows that kernels run over; those past the step's are of no sequence, token 0 and row 0.</param>
    public void Upload(StepLayout step, int[] rowSequence, CudaAttentionPlan plan, int padded)
    {
        int rows = step.RowCount;
        Copy((ReadOnlySpan<int>)[plan.ItemCount, step.QueryCount], 0);
        Copy(step.TokenIds, rows, _tokens);
        new Span<int>(_sent.Pointer + _tokens, padded)[rows..].Clear();
        new Span<int>(_sent.Pointer + _outputRows, padded)[step.OutputCount..].Clear();
        Copy(step.Positions, rows, _positions);
        Copy(rowSequence, rows, _sequences);
        Copy(step.OutputRows, step.OutputCount, _outputRows);
        Copy(plan.RowSlots, rows, _rowSlots);
        Copy(plan.Items, 5 * plan.ItemCount, _items);
        Copy(step.Queries, step.QueryCount, _queries);
        Copy(step.BiasIds, step.BiasIds.Length, _biasIds);
        Copy(step.BiasValues, step.BiasValues.Length, _biasValues);
        int tables = step.SequenceCount * step.MaxBlocks;
        Copy(step.BlockTables, tables, _tables);
        nuint bytes = (nuint)(_tables + (tables * sizeof(int)));
        Driver.cuMemcpyHtoDAsync_v2(_indices.Pointer, _sent.Pointer, bytes, _device.Stream.Value).ThrowIfFailed((long)bytes);
    }

    /// <summary>The attention plan alone, where it was made for other heads.</summary>
    public void Upload(CudaAttentionPlan plan, int rows)
    {
        _device.Stream.Synchronize(); // what is being sent may not change
        Copy((ReadOnlySpan<int>)[plan.ItemCount], 0);
        Driver.cuMemcpyHtoDAsync_v2(Counts, _sent.Pointer, sizeof(int), _device.Stream.Value).ThrowIfFailed();
        Copy(plan.RowSlots, rows, _rowSlots);
        Copy(plan.Items, 5 * plan.ItemCount, _items);
        Driver.cuMemcpyHtoDAsync_v2(RowSlots, _sent.Pointer + _rowSlots, (nuint)(_queries - _rowSlots), _device.Stream.Value).ThrowIfFailed();
    }

    /// <summary>Waits for the answers: the one time that a step does.</summary>
    public void Download(StepLayout step)
    {
        long bytes = !HasAlternatives(step)
            ? (long)step.QueryCount * sizeof(SampleResult)
            : _alternativeLogProbs + (_room.Alternatives * sizeof(float));
        Driver.cuMemcpyDtoHAsync_v2(_answered.Pointer, _answers.Pointer, (nuint)bytes, _device.Stream.Value).ThrowIfFailed((long)bytes);
        _device.Stream.Synchronize();
        new ReadOnlySpan<SampleResult>(_answered.Pointer, step.QueryCount).CopyTo(step.Results);
        for (int q = 0; q < step.QueryCount; q++)
        {
            ref readonly SampleQuery query = ref step.Queries[q];
            if (query.AlternativesCount == 0 || step.Results[q].Token < 0)
                continue;
            Range range = query.AlternativesStart..(query.AlternativesStart + query.AlternativesCount);
            new ReadOnlySpan<int>(_answered.Pointer + _alternativeIds, _room.Alternatives)[range].CopyTo(step.AlternativeIds.AsSpan(range));
            new ReadOnlySpan<float>(_answered.Pointer + _alternativeLogProbs, _room.Alternatives)[range]
                .CopyTo(step.AlternativeLogProbs.AsSpan(range));
        }
    }

    public void Dispose()
    {
        _sent.Dispose();
        _answered.Dispose();
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

    private void Copy<T>(T[] source, int count, long place)
        where T : unmanaged => Copy((ReadOnlySpan<T>)source.AsSpan(0, count), place);

    private void Copy<T>(ReadOnlySpan<T> source, long place)
        where T : unmanaged => MemoryMarshal.AsBytes(source).CopyTo(new Span<byte>(_sent.Pointer + place, source.Length * Unsafe.SizeOf<T>()));
}
