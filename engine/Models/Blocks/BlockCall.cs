using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>What a block computes with in one step.</summary>
/// <param name="Workspace">The memory for it, and the backend.</param>
/// <param name="Weights">The set in service.</param>
/// <param name="Kv">Keys and values of all layers.</param>
/// <param name="Layer">The block's own.</param>
/// <param name="Hidden">[rows, hidden]: the residual stream, which a sublayer reads and adds to.</param>
/// <param name="Rows">Tokens of the step.</param>
internal readonly record struct BlockCall(Workspace Workspace, WeightSet Weights, KvCache Kv, int Layer, Tensor Hidden, int Rows);
