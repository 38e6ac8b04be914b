namespace Rollout.Kernels;

/// <summary>
/// The step's rows in tiles that read keys and values together: rows of one sequence, or of sequences whose tables begin with the same
/// blocks (samples of one prompt). Chunks that are complete for every row of a tile are read once for the tile.
/// </summary>
internal sealed class AttentionTiles
{
    private int[] _start = [];
    private int[] _shared = [];

    public int Count { get; private set; }

    public int Start(int tile) => _start[tile];

    public int End(int tile) => _start[tile + 1];

    /// <summary>Leading chunks that are the same and complete for every row of the tile.</summary>
    public int SharedChunks(int tile) => _shared[tile] / AttentionJob.ChunkBlocks;

    public void Build(StepLayout step, int[] rowSequence, int rowsPerTile)
    {
        if (_start.Length < step.TokenIds.Length + 1)
        {
            _start = new int[step.TokenIds.Length + 1];
            _shared = new int[step.TokenIds.Length + 1];
        }

        Count = 0;
        for (int row = 0; row < step.RowCount;)
        {
            int first = row;
            for (row++; row < step.RowCount; row++)
            {
                // Sequences that share nothing are not worth a coarser unit of work.
                int a = rowSequence[row - 1], b = rowSequence[row];
                int whole = Math.Min(WholeBlocks(step, row - 1), WholeBlocks(step, row));
                if (a != b && Common(step, a, b, whole) < AttentionJob.ChunkBlocks)
                    break;
            }

            RowTiles tiles = new(row - first, rowsPerTile);
            for (int tile = 0; tile < tiles.Count; tile++)
                Add(step, rowSequence, first + tiles.Start(tile), tiles.Height(tile));
        }

        _start[Count] = step.RowCount;
    }

    private void Add(StepLayout step, int[] rowSequence, int first, int rows)
    {
        int shared = WholeBlocks(step, first);
        for (int row = first + 1; row < first + rows; row++)
            shared = Common(step, rowSequence[row - 1], rowSequence[row], Math.Min(shared, WholeBlocks(step, row)));
        _start[Count] = first;
        _shared[Count++] = shared;
    }

    private static int WholeBlocks(StepLayout step, int row) => (step.Positions[row] + 1) / KvCache.BlockTokens;

    private static int Common(StepLayout step, int a, int b, int limit)
    {
        if (a == b)
            return limit;
        int n = 0;
        while (n < limit && step.BlockTables[(a * step.MaxBlocks) + n] == step.BlockTables[(b * step.MaxBlocks) + n])
            n++;
        return n;
    }
}
