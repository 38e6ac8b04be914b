using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// Assigns rows and context to the blocks of attention.cu. A sequence with several rows is cut into tiles of rows, each of which reads its
/// whole context. A single row with more than one chunk of context is cut by chunks, and rows that have a chunk's blocks in common share
/// one item for it. Where there is no room for the parts of all rows, those with the longest contexts are cut. Items with the most chunks
/// begin first, so that the step ends with short items. The cut changes no bit: see attention.cu.
/// </summary>
internal sealed class CudaAttentionPlan
{
    /// <summary>Tokens of a chunk. As in attention.cu.</summary>
    public const int Chunk = 128;

    /// <summary>Integers of an item.</summary>
    public const int ItemNumbers = 8;

    /// <summary>Most parts of one step: those of 64 rows of 32,768 tokens, or of 1,024 rows of 2,048.</summary>
    public const int MostSlots = 16384;

    private const int ChunkBlocks = Chunk / KvCache.BlockTokens;

    private int _items;
    private int[] _chunks = [];    // by sequence: chunks of a single row that may be cut, else 0
    private long[] _byLength = []; // sequences that may be cut, longest context first

    /// <summary>As in attention.cuh, <see cref="ItemNumbers"/> each.</summary>
    public int[] Items { get; private set; } = [];

    public int ItemCount => _items;

    /// <summary>By row, for rows that are cut: the first of its parts.</summary>
    public int[] RowSlots { get; private set; } = [];

    /// <summary>Parts of all rows that are cut.</summary>
    public int Slots { get; private set; }

    /// <summary>The largest number of rows of an item.</summary>
    public int MostRows { get; private set; }

    /// <summary>Most items that a step may need: one a row, or one a part of a row that is cut.</summary>
    public static int MostItems(StepLayout step) =>
        step.TokenIds.Length + (int)Math.Min(MostSlots, MostParts(step.RowStart.Length - 1, step.MaxBlocks));

    /// <summary>
    /// Number of parts that there is room for, with heads of this dimension: no more than steps of so many sequences can need.
    /// </summary>
    public static int SlotsFor(int sequences, int maxBlocks, int heads, int headDim, long mostBytes) =>
        (int)Math.Min(Math.Min(MostSlots, MostParts(sequences, maxBlocks)), mostBytes / PartBytes(heads, headDim));

    /// <summary>Bytes of one part: for every head its weighted values, then their maximum and sum, padded to 16 bytes.</summary>
    public static long PartBytes(int heads, int headDim) => (long)heads * (headDim + 4) * sizeof(float);

    /// <param name="step">What to cut.</param>
    /// <param name="rowsPerItem">Most rows of an item.</param>
    /// <param name="mostSlots">Parts that there is room for.</param>
    public void Build(StepLayout step, int rowsPerItem, int mostSlots)
    {
        int most = ItemNumbers * MostItems(step);
        if (Items.Length < most)
            Items = new int[most];
        if (RowSlots.Length < step.TokenIds.Length)
            RowSlots = new int[step.TokenIds.Length];
        if (_chunks.Length < step.RowStart.Length)
            (_chunks, _byLength) = (new int[step.RowStart.Length], new long[step.RowStart.Length]);
        _items = 0;
        MostRows = 0;
        Cut(step, mostSlots);
        int longest = 0, shortest = int.MaxValue;
        for (int s = 0; s < step.SequenceCount; s++)
        {
            int last = step.RowStart[s + 1];
            for (int row = step.RowStart[s]; row < last && _chunks[s] == 0; row += rowsPerItem)
            {
                int rows = Math.Min(rowsPerItem, last - row), chunks = (step.Positions[row + rows - 1] / Chunk) + 1;
                Add(row, rows, 0, chunks, split: false, s, step.Positions[row + rows - 1]);
                (longest, shortest) = (Math.Max(longest, chunks), Math.Min(shortest, chunks));
            }
        }

        if (longest > shortest)
        {
            MemoryMarshal.Cast<int, Item>(Items.AsSpan(0, ItemNumbers * _items)).Sort(
                static (a, b) => a.Chunks != b.Chunks ? b.Chunks.CompareTo(a.Chunks) : a.FirstRow.CompareTo(b.FirstRow));
        }

        for (int s = 0; s < step.SequenceCount; s++)
        {
            // Neighbours that are cut: the scheduler keeps the samples of a group together.
            int begin = s;
            while (s < step.SequenceCount && _chunks[s] > 0)
                s++;
            CutByChunks(step, begin, s, rowsPerItem);
        }
    }

    /// <summary>Row tiles of the kernel for the step, with `slice` heads of a row in one item: one, or the most there may be.</summary>
    public int RowTiles(int slice, int headDim) =>
        MostRows * slice <= AttentionKernel.TileQueries ? 1 : AttentionKernel.MostRowTiles(headDim);

    /// <summary>Parts of the longest contexts that a step may have.</summary>
    private static long MostParts(int sequences, int maxBlocks) => sequences * (((long)maxBlocks + ChunkBlocks - 1) / ChunkBlocks);

    /// <summary>Chooses the rows that are cut and gives their parts places.</summary>
    private void Cut(StepLayout step, int mostSlots)
    {
        int count = 0;
        long all = 0;
        for (int s = 0; s < step.SequenceCount; s++)
        {
            int row = step.RowStart[s], chunks = step.RowStart[s + 1] - row == 1 ? (step.Positions[row] / Chunk) + 1 : 0;
            _chunks[s] = chunks > 1 ? chunks : 0;
            all += _chunks[s];
            if (chunks > 1)
                _byLength[count++] = ((long)(int.MaxValue - chunks) << 32) | (uint)s;
        }

        if (all > mostSlots)
        {
            _byLength.AsSpan(0, count).Sort();
            for (int i = 0, left = mostSlots; i < count; i++)
            {
                ref int chunks = ref _chunks[(int)_byLength[i]];
                if (chunks <= left)
                    left -= chunks;
                else
                    chunks = 0;
            }
        }

        Slots = 0;
        for (int s = 0; s < step.SequenceCount; s++)
        {
            if (_chunks[s] > 0)
            {
                RowSlots[step.RowStart[s]] = Slots;
                Slots += _chunks[s];
            }
        }
    }

    private void CutByChunks(StepLayout step, int begin, int end, int rowsPerItem)
    {
        int longest = 0;
        for (int s = begin; s < end; s++)
            longest = Math.Max(longest, _chunks[s]);
        for (int chunk = 0; chunk < longest; chunk++)
        {
            for (int s = begin; s < end;)
            {
                int rows = 1;
                if (chunk < _chunks[s])
                {
                    while (rows < rowsPerItem && s + rows < end && Shares(step, s, s + rows, chunk))
                        rows++;
                    int last = step.Positions[step.RowStart[s]];
                    for (int r = 1; r < rows; r++)
                        last = Math.Max(last, step.Positions[step.RowStart[s + r]]);
                    Add(step.RowStart[s], rows, chunk, 1, split: true, s, last);
                }

                s += rows;
            }
        }
    }

    /// <summary>
    /// Whether both see the whole of a chunk, in the same blocks, and more after it: the chunk with a row's own token is not shared.
    /// </summary>
    private static bool Shares(StepLayout step, int one, int other, int chunk)
    {
        int end = (chunk + 1) * Chunk, first = chunk * ChunkBlocks;
        return step.Positions[step.RowStart[one]] >= end && step.Positions[step.RowStart[other]] >= end
            && step.BlockTables.AsSpan((one * step.MaxBlocks) + first, ChunkBlocks)
                .SequenceEqual(step.BlockTables.AsSpan((other * step.MaxBlocks) + first, ChunkBlocks));
    }

    private void Add(int firstRow, int rows, int firstChunk, int chunks, bool split, int sequence, int last)
    {
        MostRows = Math.Max(MostRows, rows);
        MemoryMarshal.Cast<int, Item>(Items.AsSpan())[_items++] = new Item
        {
            FirstRow = firstRow,
            Rows = rows,
            FirstChunk = firstChunk,
            Chunks = chunks,
            Split = split ? 1 : 0,
            Sequence = sequence,
            Last = last,
        };
    }

    /// <summary>As in attention.cuh.</summary>
    internal struct Item
    {
        public int FirstRow, Rows;
        public int FirstChunk, Chunks;
        public int Split;
        public int Sequence;
        public int Last;
        public int Unused;
    }
}
